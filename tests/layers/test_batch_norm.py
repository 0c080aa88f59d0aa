"""Batch norms of two processes against those of one."""

import torch
import torch.distributed as dist
from torch import nn

from fambav.layers.batch_norm import SharedBatchNorm2d, share_batch_norms

IMAGES = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2 + 3


def net():
    torch.manual_seed(1)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(8, momentum=None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Sigmoid(), norms[1], nn.Sigmoid())
    for norm in norms:
        nn.init.normal_(norm.weight)
    return model


def trained(model, images):
    """The state and the gradients after two passes."""
    for _ in range(2):
        (model(images) * torch.arange(8.0)[:, None, None]).mean().backward()
    inner = getattr(model, "module", model)
    return dict(inner.state_dict()), {name: p.grad for name, p in inner.named_parameters()}


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    model = net()
    share_batch_norms(model)
    found = trained(nn.parallel.DistributedDataParallel(model), IMAGES[rank::2])
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    start = torch.multiprocessing.start_processes
    start(one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    expected = trained(net(), IMAGES)
    for rank in range(2):
        for found, exact in zip(torch.load(tmp_path / f"{rank}.pth"), expected, strict=True):
            assert found.keys() == exact.keys()
            for name, value in exact.items():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_batch_norms_are_replaced_with_their_parameters_and_work_alone():
    model, plain = net(), net()
    parameters = list(model.parameters())
    share_batch_norms(model)
    assert type(model[1]) is SharedBatchNorm2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(IMAGES), plain(IMAGES))
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))
