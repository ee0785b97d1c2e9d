"""LoRA and DoRA layers, and what a training recipe does with adapters: find, freeze, check, save and merge them."""

from fastfuse.modules.peft._utils import LORA_ATTN_MODULES as LORA_ATTN_MODULES
from fastfuse.modules.peft._utils import AdapterModule as AdapterModule
from fastfuse.modules.peft._utils import disable_adapter as disable_adapter
from fastfuse.modules.peft._utils import get_adapter_params as get_adapter_params
from fastfuse.modules.peft._utils import get_adapter_state_dict as get_adapter_state_dict
from fastfuse.modules.peft._utils import get_lora_module_names as get_lora_module_names
from fastfuse.modules.peft._utils import get_merged_lora_ckpt as get_merged_lora_ckpt
from fastfuse.modules.peft._utils import set_trainable_params as set_trainable_params
from fastfuse.modules.peft._utils import validate_missing_and_unexpected_for_lora as validate_missing_and_unexpected_for_lora
from fastfuse.modules.peft.dora import DoRALinear as DoRALinear
from fastfuse.modules.peft.dora import norms_kept as norms_kept
from fastfuse.modules.peft.lora import LoRALinear as LoRALinear
from fastfuse.modules.peft.lora import TrainableParams as TrainableParams
