"""Saves models to folders and to the Hugging Face Hub, and loads them strictly."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .safetensors_files import write_safetensors
from .weights import WeightsError, describe_differences, load_strictly, model_weights, read_checkpoint


class HubModule(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="spatial-mamba",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2410.15091",
    tags=["spatial-mamba", "state-space-model"],
):
    """A module with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    ``config.json`` holds the arguments of the constructor and ``model.safetensors`` the weights; they must match
    exactly.
    """

    _hub_mixin_config: dict[str, Any]

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights.

        Raises:
            RuntimeError: for a fused or pruned model, whose weights could not be loaded again.
        """
        if self.fused:
            raise RuntimeError("a fused model cannot be saved: save the model as it was before fuse()")
        for local_file in ("pretrained", "init_cfg"):
            self._hub_mixin_config.pop(local_file, None)
        if hasattr(self, "num_classes"):
            self._hub_mixin_config |= dict(num_classes=self.num_classes, global_pool=self.global_pool)
        with torch.device("meta"):
            rebuilt = type(self)(**self._hub_mixin_config)
        if problems := describe_differences(rebuilt.state_dict(), self.state_dict()):
            raise RuntimeError(f"the model cannot be saved because it has changed since it was made: it {problems}")
        write_safetensors(self.state_dict(), save_directory / "model.safetensors")

    @classmethod
    def _from_pretrained(cls, **options: Any) -> Any:
        """Build the model and load its weights.

        Raises:
            WeightsError: also if the options in ``config.json`` are those of another class.
        """
        try:
            return super()._from_pretrained(**options)
        except TypeError as error:
            raise WeightsError(f"{options['model_id']}: its options do not fit {cls.__name__} ({error})") from error

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load strictly, whatever ``strict`` is.

        Raises:
            WeightsError: if the file is missing or damaged, or does not fit the config next to it.
        """
        load_strictly(model, model_weights(read_checkpoint(model_file), model_file), model_file)
        return model.to(map_location).eval()

    _load_as_pickle = _load_as_safetensor
