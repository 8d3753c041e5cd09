"""Make src/pathline/data/files/electricity.npz: `python tools/make_electricity.py SOURCE TARGET`.

SOURCE is power_dec2006.npz: consecutive minutes of UCI's Individual Household Electric Power
Consumption from 16 to 30 December 2006, rows with missing values left out, as `x` (19444, 8).
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from pathline.data.splits import shuffle_split

SHA256 = "afd35ce8391040d439aaee0428ea79a37490fa71926683e8db5611c8c64eaebf"
DROPPED = ("Global_reactive_power", "Global_intensity")
NOISE = {  # widths of uniform noise, as in MAF's POWER
    "Global_active_power": 0.001,
    "Voltage": 0.01,
    "Sub_metering_1": 1.0,
    "Sub_metering_2": 1.0,
    "Sub_metering_3": 1.0,
}
SOURCE = (
    "Hebrail, Berard, Individual Household Electric Power Consumption, UCI Machine Learning "
    "Repository, 2012, doi 10.24432/C58K54, CC BY 4.0; 16 to 30 December 2006, uniform noise "
    "added, shuffled"
)


def main(source: Path, target: Path) -> None:
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{source} is not the expected file: its sha256 differs from {SHA256}")
    with np.load(source, allow_pickle=False) as data:
        names, values = data["columns"].tolist(), data["x"].astype(np.float64)
    kept = [name for name in names if name not in DROPPED]
    values = values[:, [names.index(name) for name in kept]]
    generator = np.random.default_rng(0)
    for name, width in NOISE.items():
        values[:, kept.index(name)] += width * generator.random(len(values))
    parts = shuffle_split(values.astype(np.float32), seed=42)
    train, validation, test = map(np.asfortranarray, parts)  # a column compresses better
    columns = np.array([name.lower() for name in kept])
    np.savez_compressed(
        target, train=train, validation=validation, test=test, columns=columns, source=SOURCE
    )
    print(f"{target}: {len(train)} / {len(validation)} / {len(test)} rows of {', '.join(columns)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
