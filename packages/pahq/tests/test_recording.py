"""Work that is recorded and repeated."""

import gc

import pytest
import torch


@pytest.mark.gpu
def test_what_is_thrown_away_meanwhile_does_not_matter(cuda):
    from pahq.recording import Recorder

    class Kept:
        pass

    def waste():
        """A recording that only the collection of garbage finds."""
        kept = Kept()
        kept.itself = kept
        kept.recorder = Recorder(torch.device(cuda))
        kept.recording = kept.recorder.record(lambda: torch.ones(1 << 22, device=cuda) * 2)

    x = torch.arange(4.0, device=cuda)
    for _ in range(3):
        waste()

        def body():
            gc.collect() if gc.isenabled() else None
            return x + x

        found = Recorder(torch.device(cuda)).record(body)
        x.fill_(3)
        assert found().tolist() == [6.0] * 4
        assert gc.isenabled()


@pytest.mark.gpu
def test_what_breaks_a_recording_is_told(cuda):
    from pahq.recording import Recorder

    def body():
        raise ValueError("no such thing")

    recorder = Recorder(torch.device(cuda))
    with pytest.raises(ValueError, match="no such thing"):
        recorder.record(body)
    assert gc.isenabled()
    assert recorder.record(lambda: torch.ones(2, device=cuda))().tolist() == [1.0, 1.0]
