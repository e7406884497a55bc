"""Installs the module tun6 and the command tun6: `pip install .`; with what the tests need: `pip install -e '.[test]'`."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "tun6.py").read_text(encoding="utf-8"), re.MULTILINE)
assert version

setup(
    name="tun6",
    version=version[1],
    description="A stable, routed IPv6 /64 for any machine that can open one IPv4 TCP connection",
    long_description=(here / "README").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["tun6"],
    python_requires=">=3.9",
    install_requires=["gevent", "netifaces", "python-pytun"],
    extras_require={
        "bench": ["matplotlib"],
        "cluster": ["psycopg[binary]>=3.2"],
        "metrics": ["prometheus_client"],
        "test": ["build", "hypothesis", "mypy", "prometheus_client", "pytest", "ruff==0.17.6", "setuptools>=70.1"],
    },
    entry_points={"console_scripts": ["tun6 = tun6:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Internet",
        "Topic :: System :: Networking",
    ],
)
