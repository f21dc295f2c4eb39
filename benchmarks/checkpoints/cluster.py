"""A Ray cluster on loopback for the benchmark beside it: starts, prints its address, ends with its stdin.

    python benchmarks/checkpoints/cluster.py CPUS

The environment brings the cluster's token (RAY_AUTH_TOKEN_PATH).
"""

import logging
import sys

import ray

OBJECT_STORE_BYTES = 128 << 20  # tensors never travel through Ray


def main() -> None:
    """Run one until nobody wants it any more."""
    ray.init(
        address="local",
        num_cpus=int(sys.argv[1]),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
