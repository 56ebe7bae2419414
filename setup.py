"""Two import packages under two source roots; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = {"flowgrove": "engine", "flowgrove_kernels": "kernels"}

setup(
    packages=[package for root in ROOTS.values() for package in find_packages(root)],
    package_dir={package: f"{root}/{package}" for package, root in ROOTS.items()},
)
