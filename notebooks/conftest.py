"""nbval: kernels started here draw no progress bars, which would be an output that the stored run does not have."""

import os

os.environ["CFOL_NB_PROGRESS"] = "off"
os.environ.pop("MPLBACKEND", None)
