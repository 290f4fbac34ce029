"""Resumed loops continue with the same images and augmentation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.config import Config
from mmengine.dataset import BaseDataset, InfiniteSampler
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator

from spatial_mamba.detection.openmmlab.resume import ExactResumeHook
from spatial_mamba.kernels.errors import UserError


class Noise(BaseDataset):
    """Samples with a width, a height and a random number, drawn by the pipeline."""

    def load_data_list(self) -> list[dict]:
        return [dict(width=1 + i % 3, height=2, number=i) for i in range(11)]


def draw(results: dict) -> tuple[int, float]:
    return results["number"], np.random.rand()


def batches(group: type[BatchSampler], workers: int, done: int) -> list:
    """Batches 0 to 9 of an iteration-based loop, as seen by a runner that resumes after ``done`` of them."""
    torch.manual_seed(done)  # the state of the generator must not matter
    dataset = Noise(pipeline=[draw])
    sampler = group(InfiniteSampler(dataset, seed=99 + done), batch_size=2, drop_last=False)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)
    loop = object.__new__(IterBasedTrainLoop)
    loop.dataloader, loop.dataloader_iterator = loader, _InfiniteDataloaderIterator(loader)
    cfg = Config(dict(train_dataloader=dict(sampler=dict(type="InfiniteSampler"))))
    ExactResumeHook().before_train(SimpleNamespace(train_loop=loop, seed=5, iter=done, cfg=cfg))
    return [next(loop.dataloader_iterator) for _ in range(10)]


@pytest.mark.parametrize("group", [BatchSampler, AspectRatioBatchSampler])
def test_a_resumed_loop_continues_with_the_same_images_and_augmentation(group: type[BatchSampler]) -> None:
    expected = batches(group, workers=0, done=0)
    numbers = [sample for batch in expected for sample in batch]
    assert len({number for number, _ in numbers[:11]}) >= 9  # except those that wait for a partner
    assert len({noise for _, noise in numbers}) == 20
    resumed = batches(group, workers=2, done=4)
    assert resumed[4:] == expected[4:]
    assert resumed[:4] == [None] * 4  # not loaded


def test_a_config_without_training_can_be_tested() -> None:
    runner = SimpleNamespace(cfg=Config(dict()), _resume=False)
    ExactResumeHook().after_load_checkpoint(runner, {"meta": {"update": {"processes": 2}}})


@pytest.mark.parametrize("images", [2, 4])
@pytest.mark.parametrize("kind", [EpochBasedTrainLoop, IterBasedTrainLoop])
def test_an_update_of_another_size_is_reported(images: int, kind: type) -> None:
    warnings: list[str] = []
    runner = SimpleNamespace(
        cfg=Config(dict(train_dataloader=dict(batch_size=images))), train_loop=object.__new__(kind), _resume=True,
        _load_from=None, work_dir="work", logger=SimpleNamespace(warning=warnings.append),
    )  # fmt: skip
    saved, hook = {"meta": {}}, ExactResumeHook()
    hook.finished = 3
    hook.before_save_checkpoint(runner, saved)
    hook.after_load_checkpoint(runner, saved)
    assert hook.finished == 3 and not warnings
    saved["meta"]["update"]["images per process"] = 2
    if images == 2:
        hook.after_load_checkpoint(runner, saved)
        assert not warnings
    elif kind is EpochBasedTrainLoop:
        with pytest.raises(UserError, match=r"^work: was saved with .*: 2\}, but this run has .*: 4\}: in the middle"):
            hook.after_load_checkpoint(runner, saved)
        hook.finished = saved["meta"]["finished_batches"] = 0
        hook.after_load_checkpoint(runner, saved)
        assert len(warnings) == 1
    else:
        hook.after_load_checkpoint(runner, saved)
        assert warnings[0].endswith("the run continues, but not exactly")
