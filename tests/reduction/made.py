"""Reductions without a model around them."""

import torch

from fambav.layers import INTERMEDIATES, BackboneInfo, Stage, Tokens
from fambav.ops.match import others
from fambav.reduction import Reduction, Schedule, from_fusion, make_reducer, make_schedule
from tests import golden


def body(length, *, depth=1, cls_index=(), grid=None, **rest):
    """Describe a model of width 8."""
    grid = grid or (1, length - len(cls_index))
    directions, intermediates = rest.pop("directions", 2), rest.pop("intermediates", INTERMEDIATES)
    stage = Stage(depth, rest.pop("dim", 8), grid, length, directions, intermediates)
    rest = {"family": "vim", "cls_index": tuple(cls_index), **rest}
    return BackboneInfo(stages=(stage,), **rest)


def reducing(method, counts, tokens, **how):
    """A method at work, that removes `counts` of tokens like these; with how, and its options."""
    policies = {n: how.pop(n) for n in ("hook", "scan", "gap_policy", "class_policy") if n in how}
    made = make_reducer(method, **how)
    places = tokens.cls_index[0].tolist()
    length = tokens.position.shape[1]
    sizes = body(length, depth=len(counts), cls_index=places, grid=tokens.grid)
    after = policies.get("hook", made.hook) == "after"
    schedule = Schedule.of(length, tuple(counts), after=after)
    return Reduction(sizes, made, schedule, **policies)


def reduce(tokens, method, *counts, **how):
    """Remove `counts` tokens, one after the other."""
    reduction = reducing(method, counts, tokens, **how)
    for layer in range(len(counts)):
        tokens = reduction(tokens, layer)
    return tokens


def schedule(strategy="none", *, depth, start, cls_index, method="famba-v", count=0, **rest):
    """The plan of a strategy for a model of these sizes."""
    reducer = make_reducer(method)
    text = from_fusion(strategy, depth=depth, token=count, **rest)
    if text is None:
        return Schedule.of(start, (0,) * depth)
    given = ("fusion_plan", rest["plan"]) if "plan" in rest else ("fusion_token", count)
    return make_schedule(text, body(start, depth=depth, cls_index=cls_index), reducer, given=given)


def some(cls_index, length=65, batch=3, grid=None):
    """Tokens of random features, the same ones each time."""
    torch.manual_seed(0)
    start = Tokens.start(torch.randn(batch, length, 8), cls_index=cls_index, grid=grid, trace=True)
    return start._replace(residual=torch.randn(batch, length, 8))


def pick(x, places):
    """Rows of x at `places`, (batch, k)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def agree(merged, tokens, groups, weight, *, summed=False):
    """Check every field against the groups of places, the absorbing one first; others are gone."""
    weight = torch.ones_like(tokens.size) if weight is None else weight
    parts = [1.0 if summed else weight[0, g].sum() for g in groups]
    means = [
        (weight[0, g, None] * tokens.x[0, g]).sum(0) / part
        for g, part in zip(groups, parts, strict=True)
    ]
    where = {member: new for new, g in enumerate(groups) for member in g}
    torch.testing.assert_close(merged.x[0], torch.stack(means))
    assert merged.size[0].tolist() == [tokens.size[0, g].sum() for g in groups]
    assert merged.position[0].tolist() == [tokens.position[0, g[0]] for g in groups]
    assert merged.cls_index[0].tolist() == [
        groups.index([place]) for place in tokens.cls_index[0].tolist()
    ]
    assert merged.source[0].tolist() == [where.get(old, -1) for old in tokens.source[0].tolist()]


def cosine(a, b):
    """Of two lists of numbers; 0 where one has no direction."""
    norms = (sum(v * v for v in a) * sum(v * v for v in b)) ** 0.5
    return sum(v * w for v, w in zip(a, b, strict=True)) / norms if norms else 0.0


def insert(name, length, places):
    """Golden patch rows with the golden class row put among them at `places`."""
    patches, cls = golden.hashed(name, 2, length - 1, 16), golden.hashed(f"{name}_cls", 2, 1, 16)
    out = torch.empty(2, length, 16)
    for rows, at in ((patches, others(places, length)), (cls, places)):
        out = out.scatter(1, at[..., None].expand(-1, -1, 16), rows)
    return out


def twin_order(groups, cls_index, policy, length):
    """Put the class tokens' groups, which are [place], where a policy wants them."""
    if policy == "exact":
        return groups
    patches = [group for group in groups if group[0] not in cls_index]
    for place in sorted(cls_index):
        new = place * len(groups) // length if policy == "proportional" else (len(groups) - 1) // 2
        patches.insert(new, [place])
    return patches
