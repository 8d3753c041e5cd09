"""Other people's flows with exact densities, to measure Pathline's against.

Each is a `Peer`: a module that the loop of `training_curves.py` trains and evaluates.
"""
