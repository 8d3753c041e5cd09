"""Stand-ins for other libraries, for programs that already call them."""
