"""A Ray cluster of two nodes on this machine, bound to 127.0.0.1; ends with its standard input.

Prints the address and the process id of the second node's raylet. What connects to it must run
with ENVIRONMENT: Ray takes 127.0.0.1 for the machine's own address otherwise.
"""

import os
import sys

ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    # A dead node is noticed in seconds.
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
    head = {**node, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    (raylet,) = cluster.add_node(**node).all_processes["raylet"]
    print(cluster.address, raylet.process.pid, flush=True)
    sys.stdin.read()
    cluster.shutdown()
