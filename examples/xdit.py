"""Caching under xDiT (xfuser): the ranks that share a sequence decide together.

    torchrun --nproc_per_node=4 examples/xdit.py --model Wan2.1-T2V --ulysses_degree 4 --prompt "a cat on the beach"

xDiT's own runner with one line more. Its Wan transformers take their rank's tokens out of the sequence by themselves,
which nobody can see from outside: hence the group, and the word that ranks hold runs of tokens.

- `group`: the ranks whose blocks wait for one another. They add up a few numbers, and so reuse in the same steps. With
  `--use_cfg_parallel` each branch of guidance has such a group, and a schedule of its own; so have data parallel ranks.
  With `--fully_shard_degree`, all ranks that share parameters must be in the group, else it is refused.
- `sequence_shards`: motion needs a frame's tokens of the rank before. Not where each rank has some rows of every frame
  instead, as in xDiT's scripts for CogVideoX and ConsisID: there the group is enough.
- Where the ranks do not divide the tokens, xDiT pads them, and padding lies in no frame: an error says so. Choose
  another size or degree, or a configuration without motion.

Tested with two ranks on an interface double of xfuser 0.4.5 (`tests/support/doubles/xfuser.py`), which has its names,
its split and its gather, but a tiny model and an attention of its own. It was not run with the package itself.
"""

import sys
from dataclasses import replace

import torch.distributed as dist
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_sp_group
from xfuser.runner import xFuserModelRunner

from adacache_triton import AdaCacheConfig, AdaCacheHandle, apply_adacache
from adacache_triton.models import stack_of

CONFIG = AdaCacheConfig.official("open-sora-30-fast", moreg=True)  # to start from: fitted to another model


def cache(pipeline, config: AdaCacheConfig) -> AdaCacheHandle:
    stack = replace(stack_of(pipeline.transformer), sequence_shards=True)
    return apply_adacache(pipeline, config, stack=stack, group=get_sp_group().device_group)


def main() -> int:
    parser = FlexibleArgumentParser(description=__doc__.partition("\n")[0])
    arguments = vars(xFuserArgs.add_runner_args(parser).parse_args())
    runner = xFuserModelRunner(arguments)
    request = runner.preprocess_args(arguments)
    runner.initialize(request)
    handle = cache(runner.model.pipe, CONFIG)  # when parameters are sharded and the transformer is compiled
    output, timings = runner.run(request)
    if dist.get_rank() == 0:
        print(handle.report())
    runner.save(output=output, timings=timings)
    runner.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
