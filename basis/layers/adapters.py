"""Adapters of PEFT: what is otherwise in their layers.

What a method learns there is not saved with them.
`PeftModel.save_pretrained` writes every entry of the state_dict whose name has "lora_" in it, and
reads them back by name into a model that knows nothing of sketches. What the layer lora_A has
learned would go into that file: most of its tensors would be ours, and their shapes would be taken
for damage. So in layers inside a module of PEFT these buffers are not persistent: they move with
the layer, and no state_dict holds them. A run resumed from an adapter learns them anew.

Their inputs may be casts of one tensor, which count as one input (shared_input.py).

lora_A is what is worth sketching (its input is the layer's, in full width); the frozen layer beside
it and lora_B are left as they are (sketch.py).
"""

from __future__ import annotations

from torch import nn

from basis.sketched import Sketched
from basis.state import Learning


def settle_in_adapters(model: nn.Module) -> None:
    """Of all layers of `model` that are within a module of PEFT: keep their state out of its
    state_dict, and let them share what was cast for each.
    """
    for module in model.modules():
        if type(module).__module__.startswith("peft."):
            for layer in module.modules():
                if isinstance(layer, Learning):
                    layer.leave_state_unsaved()
                if isinstance(layer, Sketched):
                    layer.reads_casts = True
