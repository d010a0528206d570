"""The one thing `pyproject.toml` cannot say: top-level folders that are subpackages.

Their names are too greedy to claim in site-packages, so `profiles/` is installed as
`flashtalk_rt.profiles`, and so on.
"""

from setuptools import find_packages, setup

MAPPED = ["graphs", "profiles", "triton_kernels"]

setup(
    packages=find_packages(include=["flashtalk_rt", "flashtalk_rt.*"])
    + [f"flashtalk_rt.{folder}" for folder in MAPPED],
    package_dir={f"flashtalk_rt.{folder}": folder for folder in MAPPED},
)
