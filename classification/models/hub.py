"""Saving models to folders and to the Hugging Face Hub, and loading them strictly: ``huggingface_hub``'s mixin."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from .weights import load_strictly, read_checkpoint


class HubMixin(
    PyTorchModelHubMixin,
    library_name="spatial-mamba",
    license="apache-2.0",
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/2410.15091",
    tags=["spatial-mamba", "state-space-model"],
):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained``: ``config.json`` and ``model.safetensors``.

    ``config.json`` holds the arguments of the constructor, ``from_pretrained`` calls it with them. Loading takes
    exactly the model's weights.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights.

        Raises:
            RuntimeError: for a fused model, whose weights cannot be loaded again.
        """
        if self.fused:
            raise RuntimeError("a fused model cannot be saved: save the model as it was before fuse()")
        self._hub_mixin_config.pop("pretrained", None)  # a file of the machine that the model was made on
        if hasattr(self, "num_classes"):
            self._hub_mixin_config |= dict(num_classes=self.num_classes, global_pool=self.global_pool)
        super()._save_pretrained(save_directory)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load strictly, whatever ``strict`` says.

        Raises:
            WeightsError: if the file is missing or damaged, or does not fit the config beside it.
        """
        load_strictly(model, read_checkpoint(model_file), model_file)
        return model.to(map_location).eval()
