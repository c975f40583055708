"""Evaluations of the papers, one file each; they register themselves in the order of `all`."""
from . import accuracy  # noqa: F401  # isort: skip
from . import robustness  # noqa: F401  # isort: skip
from . import calibration  # noqa: F401  # isort: skip
from . import ood  # noqa: F401  # isort: skip
from . import localization  # noqa: F401  # isort: skip
from . import embedding  # noqa: F401  # isort: skip
from . import intrusion  # noqa: F401  # isort: skip
from . import cost  # noqa: F401  # isort: skip
