#!/usr/bin/env python3
"""Stands in for `helm`: knows how KubeRay's operator is installed."""

import re
import sys

words = " ".join(sys.argv[1:])
_KNOWN = (
    r"repo add kuberay https://ray-project\.github\.io/kuberay-helm/",
    r"install kuberay-operator kuberay/kuberay-operator --version 1\.\d+\.\d+",
)
if not any(re.fullmatch(form, words) for form in _KNOWN):
    sys.exit(f"helm: unexpected arguments: {words}")
