#!/bin/bash
# One node's part of a run: start it on every node, with the same arguments. HEAD is any one of them, by a name that all
# can reach; run.root and run.cache must lie where all of them read and write.
#
#   NODES=2 HEAD=node0 experiments/cluster/node.sh exp=study-large run.root=/shared/runs
#
# A rank a GPU (RANKS: so many). When a rank dies all start again, RESTARTS times, and go on from what is whole.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else ranks that start again look for the dead ones (pytorch#135712)
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "${RANKS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-dpo}" \
    -m dpo.train run.resume=auto "$@"
