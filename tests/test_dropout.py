"""A process's dropout masks are its rows of the global batch's, in every memory layout."""

import pytest
import torch
from torch import nn

from models.score.ddpm_unet import DDPMUNet
from models.score.dropout import Dropout, LibraryDropout, share_of_batch

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def dropped(layer, x, rows=None, total=None):
    torch.manual_seed(3)
    if rows is None:
        return layer(x)
    with share_of_batch(rows, total):
        return layer(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [Dropout(0.3), Dropout(0.3).unscaled, LibraryDropout(0.3)], ids=str)
def test_rows_keep_their_masks_however_the_batch_is_shared(layer, layout):
    x = torch.rand(6, 4, 3, 5).add(0.5).contiguous(memory_format=layout)
    whole = dropped(layer, x)
    assert 0.1 < (whole == 0).float().mean() < 0.5
    for shares in ([(0, 3), (3, 3)], [(0, 2), (2, 2), (4, 2)]):
        parts = [dropped(layer, x[first : first + count], (first, count), 6) for first, count in shares]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)


def test_several_batches_in_one_input_are_shared_alike():
    x = torch.ones(8, 5)
    whole = dropped(Dropout(0.5), x)
    for first in (0, 2):
        own = torch.cat([x[first : first + 2], x[4 + first : 6 + first]])
        expected = torch.cat([whole[first : first + 2], whole[4 + first : 6 + first]])
        assert torch.equal(dropped(Dropout(0.5), own, (first, 2), 4), expected)
    with pytest.raises(ValueError, match="3 rows, accepted: a multiple of the 2"):
        dropped(Dropout(0.5), x[:3], (0, 2), 4)


def test_a_share_ends_with_its_block_and_without_training_nothing_is_dropped():
    x = torch.ones(4, 50)
    whole = dropped(Dropout(0.5), x)
    dropped(Dropout(0.5), x[:2], (2, 2), 4)
    assert torch.equal(dropped(Dropout(0.5), x), whole)
    assert torch.equal(dropped(Dropout(0.5).eval(), x, (0, 4), 8), x)
    assert torch.equal(dropped(LibraryDropout(0.5).eval(), x, (0, 4), 8), x)


def test_alone_the_library_s_masks_are_those_of_pytorch():
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(dropped(LibraryDropout(0.2), x), dropped(nn.Dropout(0.2), x))


def test_no_other_dropout_is_left_in_the_library_s_network():
    network = DDPMUNet([3, 8, 8], nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.1)
    found = [part for part in network.modules() if isinstance(part, nn.Dropout) and part.p]
    assert found and all(isinstance(part, LibraryDropout) for part in found)
    assert all(part.p == 0.1 for part in found)
