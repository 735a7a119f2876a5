"""`load` and `save` for DeepseekV3ForCausalLM folders (config.json and safetensors).

    model = load("DeepSeek-V3")                      # FP8 weights are dequantized
    model = load("DeepSeek-V3", quantized="keep")    # or computed from as they are
    save(model, "exported", quantization="fp8")

Loading checks every name and shape from the files' headers first, then reads tensor by tensor into
arrays allocated once a parameter: the host holds the model and one tensor. Saving holds one shard.
`hf_config` maps the configuration, `names` the tensors, `fp8_blocks` the quantized ones.
"""

from dsv3_jax.interop.loading import NotKept, load
from dsv3_jax.interop.saving import SHARD_BYTES, save

__all__ = ["SHARD_BYTES", "NotKept", "load", "save"]
