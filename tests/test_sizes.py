"""What do blocks compile for? Stand-ins that are whole in themselves, whatever the inputs are that come first."""

from __future__ import annotations

import torch

from k5train.forward.sizes import SizedInputs


def test_lengths_of_stand_ins_are_within_their_captions():
    lengths = torch.tensor([40, 12], dtype=torch.int32)
    inputs = SizedInputs(torch.zeros(2, 9, 8), torch.zeros(2, 40, 8), torch.zeros(1, 9, 1, 2, 2, 2), lengths)
    largest = inputs.stand_ins((16, 20), ())
    assert largest.text.shape == (2, 20, 8)
    assert largest.lengths is not None
    assert largest.lengths.tolist() == [1, 1]  # a kernel would read as many keys as they say
    assert inputs._replace(lengths=None).stand_ins((16, 20), ()).lengths is None
