"""The packages. They stand here, because pyproject.toml cannot both find packages and map one to a folder."""

from setuptools import find_packages, setup

KERNELS = "kernels/torch-ext/adacache_kernels"  # laid out for the Hugging Face Hub

setup(
    packages=[
        *find_packages(include=["adacache_triton", "adacache_triton.*"]),
        "adacache_triton.kernels",
        *(f"adacache_triton.kernels.{name}" for name in find_packages(KERNELS)),
    ],
    package_dir={"adacache_triton.kernels": KERNELS},
    package_data={"adacache_triton.testbed": [f"weights/**/*.{ending}" for ending in ("json", "safetensors", "md")]},
)
