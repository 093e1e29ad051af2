"""Statistics drawn at random, and models in which something is known not to matter."""

import torch
from slimmoe.architectures import Axis
from slimmoe.calibration.statistics import (
    CalibrationStatistics,
    ExpertStatistics,
    LayerStatistics,
    NormStatistics,
)
from slimmoe.weights import Source


def statistics(model, seed=0):
    """Random statistics of every layer and norm."""
    source = model if isinstance(model, Source) else Source(model)
    config, draws = source.config, torch.Generator().manual_seed(seed)
    width, count = config["hidden_size"], source.family.count(config)
    neurons, tokens = config[source.family.neurons], 1000

    def drawn(*shape):
        return 100 * torch.rand(*shape, generator=draws, dtype=torch.float64)

    def signed(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    def experts():
        logits = signed(50, count)
        return ExpertStatistics(
            tokens=tokens, count=drawn(count).round() + 1, weight_sum=drawn(count),
            share_sum=drawn(count), norm_sum=drawn(count), weighted_norm_sum=drawn(count),
            norm_max=drawn(count), logit_gram=logits.T @ logits,
            output_sum=signed(count, width), activation_sum=drawn(count, neurons),
            probability_sum=drawn(count),
        )  # fmt: skip

    sites = sorted({m.site for m in source.matches.values() if m.row.norm is not None})
    return CalibrationStatistics(
        model_type=source.family.model_type, config_sha256="0" * 64, dtype="float32",
        tokens=tokens, sequences=1, batches=1, tokens_sha256="0" * 64,
        experts={place: experts() for place in source.places()},
        # not all of them over as many tokens
        norms={site: NormStatistics(tokens=tokens * (1 + at), output_abs_sum=drawn(width),
                                    input_square_sum=drawn(width))
               for at, site in enumerate(sites)},
        layers={layer: LayerStatistics(tokens=tokens, output_sum=signed(width))
                for layer in range(source.layers)},
        embedding=LayerStatistics(tokens=tokens, output_sum=signed(width)),
    )  # fmt: skip


@torch.no_grad()
def without_channels(model, dead):
    """Let nothing be on some channels of the residual stream: no embedding, no writer."""
    source = Source(model)
    state = model.state_dict()
    for name, match in source.matches.items():
        axes = match.row.axes
        if match.row.norm is not None:
            continue
        for dim, axis in enumerate(axes):
            writes = name == "model.embed_tokens.weight" or axes[0] is Axis.RESIDUAL
            writes |= "down_proj" in name
            if axis is Axis.RESIDUAL and writes:
                state[name].index_fill_(dim, torch.tensor(dead), 0)
    return model


@torch.no_grad()
def without_layers(model, layers):
    """Let some layers write nothing."""
    for name, tensor in model.state_dict().items():
        if any(name.startswith(f"model.layers.{layer}.") for layer in layers) and (
            "o_proj" in name or "down_proj" in name or "out_proj" in name
        ):
            tensor.zero_()
    return model


@torch.no_grad()
def never_selected(model, experts):
    """Let some experts be selected for no token, by a channel that is the same for all."""
    state = model.state_dict()
    without_channels(model, [0])
    state["model.embed_tokens.weight"][:, 0] = 3.0
    offset = 0.0 if model.config.model_type != "qwen3_next" else -1.0
    for name, match in Source(model).matches.items():
        if match.row.norm is not None:
            state[name][0] = 1.0 + offset
        elif match.row.router:
            state[name][:, 0] = 0
            state[name][experts, 0] = -200.0
        elif match.row.axes == (Axis.EXPERT,):
            state[name][experts] = -5.0
    return model
