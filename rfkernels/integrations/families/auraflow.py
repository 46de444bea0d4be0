"""AuraFlow of diffusers."""

from torch import Tensor

from rfkernels.integrations.families.forward import Forward, refuse
from rfkernels.models import auraflow

__all__ = ["BLOCKS"]


def joint(block, hidden_states, encoder_hidden_states, temb, attention_kwargs=None) -> tuple[Tensor, Tensor]:
    refuse(attention_kwargs=attention_kwargs)
    return auraflow.joint_block(block, hidden_states, encoder_hidden_states, temb)


def single(block, hidden_states, temb, attention_kwargs=None) -> Tensor:
    refuse(attention_kwargs=attention_kwargs)
    return auraflow.single_block(block, hidden_states, temb)


REGIONS = ("norm_modulate", "attention", "gated_residual_norm_modulate", "swiglu", "gated_residual")
BLOCKS = {
    "AuraFlowJointTransformerBlock": Forward(joint, ("AuraFlowAttnProcessor2_0",), REGIONS),
    "AuraFlowSingleTransformerBlock": Forward(single, ("AuraFlowAttnProcessor2_0",), REGIONS),
}
