"""accelerate's own FSDP2 for processes without a GPU: it turns FSDP on for accelerators only, and else runs DDP."""

from __future__ import annotations

import accelerate.accelerator
import accelerate.state
from accelerate.utils import DistributedType


def shard_on_gloo():
    """From now on an FSDP plugin on a group of CPU processes is what it is on GPUs; without a plugin nothing changes.
    Called again it does nothing."""
    init = accelerate.state.AcceleratorState.__init__
    if init.__name__ == "with_plugin":
        return

    def with_plugin(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    def sharded(self):
        return getattr(self, "fsdp_plugin", None) is not None

    accelerate.state.AcceleratorState.__init__ = with_plugin
    accelerate.state.AcceleratorState.is_fsdp2 = property(sharded)
    accelerate.accelerator.Accelerator.is_fsdp2 = property(lambda self: sharded(self.state))
    accelerate.accelerator.Accelerator.distributed_type = property(
        lambda self: DistributedType.FSDP if sharded(self.state) else self.state.distributed_type)
