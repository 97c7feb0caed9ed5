"""Adapters of PEFT: what a method learns there is not saved with them.

`PeftModel.save_pretrained` writes every entry of the state_dict whose name has "lora_" in it, and
reads them back by name into a model that knows nothing of sketches. What the layer lora_A has
learned would go into that file: most of its tensors would be ours, and their shapes would be taken
for damage. So in layers inside a module of PEFT these buffers are not persistent: they move with
the layer, and no state_dict holds them. A run resumed from an adapter learns them anew.

lora_A is what is worth sketching (its input is the layer's, in full width); the frozen layer beside
it and lora_B are left as they are (sketch.py).
"""

from __future__ import annotations

from torch import nn

from basis.state import Learning


def keep_out_of_adapters(model: nn.Module) -> None:
    """Keep the state of all layers of `model` that are within a module of PEFT out of its
    state_dict.
    """
    for module in model.modules():
        if type(module).__module__.startswith("peft."):
            for layer in module.modules():
                if isinstance(layer, Learning):
                    layer.leave_state_unsaved()
