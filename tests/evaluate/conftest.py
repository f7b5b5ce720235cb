"""Makes the demo's modules importable, as they are when its scripts run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes_vqa"))
