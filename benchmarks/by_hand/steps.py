"""The step by hand: clipping, optimizers, and what wraps them. Gradients are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from by_hand._cases import Case, Host, Run, at_step, case, values_of, with_gradients
from stretto import methods
from stretto.core import GradientsMethod, Method, Recipe
from stretto.plan import Plan
from stretto.update import Updater

# -- clipping


def clip_case(
    host: Host, method: GradientsMethod, by_hand: Callable[[nn.Module, list[nn.Parameter]], Any], **more: Any
) -> Case:
    """Clip the same gradients again and again, large ones brought back each time, which the base does too."""
    at = at_step()

    def runs(clip: Callable[[nn.Module], Any]) -> Run:
        model = with_gradients(host.model())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        large = [3 * g for g in gradients]

        def run() -> list[Tensor]:
            torch._foreach_copy_(gradients, large)
            with torch.no_grad():
                clip(model)
            return gradients

        return run

    reference = more.pop("reference", None)

    def hand(model: nn.Module) -> Any:
        return by_hand(model, parameters.setdefault(id(model), list(model.parameters())))

    parameters: dict[int, list[nn.Parameter]] = {}
    return Case(
        runs(lambda model: method.gradients(model, at, {})),
        runs(hand),
        runs(lambda model: None),
        reference=runs(reference) if reference else None,
        **more,
    )


@case("gradient_clipping", "conv", "gpt", foreach=True)
def _gradient_clipping(host: Host) -> Case:
    def by_hand(model: nn.Module, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (1.0 / (total + 1e-6)).clamp(max=1.0))

    return clip_case(
        host,
        methods.GradientClipping(1.0),
        by_hand,
        reference=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        reference_name="clip_grad_norm_",
        rtol=1e-6,
    )


@case("gradient_value_clipping", "conv", "gpt", foreach=True)
def _gradient_value_clipping(host: Host) -> Case:
    def by_hand(model: nn.Module, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_clamp_min_(gradients, -0.01)
        torch._foreach_clamp_max_(gradients, 0.01)

    return clip_case(
        host,
        methods.GradientValueClipping(0.01),
        by_hand,
        reference=lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
        reference_name="clip_grad_value_",
    )


@case("adaptive_gradient_clipping", "conv", "gpt")
def _adaptive_gradient_clipping(host: Host) -> Case:
    def by_hand(model: nn.Module, parameters: list[nn.Parameter]) -> None:
        for p in parameters[: -1 if host.name == "gpt" else -2]:  # the head is the last layer
            assert p.grad is not None
            if p.ndim < 2:
                weight, gradient = p.norm(), p.grad.norm()
            else:
                dims = tuple(range(1, p.ndim))
                weight, gradient = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (p, p.grad))
            p.grad.mul_((0.01 * weight.clamp(min=1e-3) / gradient.clamp(min=1e-6)).clamp(max=1.0))

    return clip_case(host, methods.AdaptiveGradientClipping(), by_hand, rtol=1e-5)


# -- optimizers


def matrices_and_vectors(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The usual two groups."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def step_case(
    host: Host,
    chosen: tuple[Method, ...],
    by_hand: Callable[[nn.Module], Callable[[], Any]],
    base: Callable[[nn.Module], Callable[[], Any]] | None = None,
    steps: int = 1,
    **more: Any,
) -> Case:
    """The optimizer's step of a recipe, beside one made by hand."""

    models = []

    def runs(make: Callable[[nn.Module], Callable[[], Any]]) -> Run:
        model = with_gradients(host.model())
        models.append(model)
        step = make(model)
        values = values_of(model)

        def run() -> dict[str, Tensor]:
            for _ in range(steps):
                step()
            return values

        return run

    reference = more.pop("reference", None)
    return Case(
        runs(lambda model: optimizer_of(Recipe(*chosen), model).step),
        runs(by_hand),
        runs(base) if base else None,
        reference=runs(reference) if reference else None,
        fresh=lambda: [with_gradients(model) for model in models],
        **more,
    )


def optimizer_of(recipe: Recipe, model: nn.Module) -> Optimizer:
    """As an Updater builds it, its schedules at a step late in the run."""
    updater = Updater(recipe, model, nn.CrossEntropyLoss(), Plan(recipe, 320, 32, steps=100))
    updater._schedule(at_step(60))
    return updater.optimizer


def plain_adamw(model: nn.Module, decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)) -> Optimizer:
    """torch's own, fused."""
    return torch.optim.AdamW(matrices_and_vectors(model, decay), lr=2e-3, betas=betas, fused=True)


@case("adamw", "conv", "gpt", foreach=True)
def _adamw(host: Host) -> Case:
    return step_case(
        host,
        (methods.AdamW(),),
        lambda model: plain_adamw(model).step,
        reference=lambda model: (
            torch.optim.AdamW(matrices_and_vectors(model, 0.1), lr=2e-3, foreach=True).step
        ),
        reference_name="torch.optim.AdamW(foreach)",
    )


@case("sgd", "conv", "gpt", foreach=True)
def _sgd(host: Host) -> Case:
    def by_hand(model: nn.Module) -> Callable[[], Any]:
        groups = matrices_and_vectors(model, 0.0)
        decaying = groups[0]["params"]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)

        def step() -> None:
            with torch.no_grad():
                torch._foreach_mul_(decaying, 1 - 0.1 * 5e-4)
            optimizer.step()

        return step

    def reference(model: nn.Module) -> Callable[[], Any]:
        groups = matrices_and_vectors(model, 5e-4)
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=True).step

    return step_case(
        host, (methods.SGD(),), by_hand, reference=reference, reference_name="torch.optim.SGD(foreach), L2"
    )


@case("lion", "conv", "gpt", foreach=True)
def _lion(host: Host) -> Case:
    def by_hand(model: nn.Module) -> Callable[[], Any]:
        parameters = list(model.parameters())
        decaying = [p for p in parameters if p.ndim >= 2]
        momenta = [torch.zeros_like(p) for p in parameters]

        @torch.no_grad()
        def step() -> None:
            gradients = [p.grad for p in parameters]
            signs = torch._foreach_lerp(momenta, gradients, 0.1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(decaying, 1 - 2e-4)
            torch._foreach_add_(parameters, signs, alpha=-2e-4)
            torch._foreach_lerp_(momenta, gradients, 0.01)

        return step

    return step_case(host, (methods.Lion(),), by_hand, rtol=1e-6)


@case("muon", "gpt")
def _muon(host: Host) -> Case:
    def by_hand(model: nn.Module) -> Callable[[], Any]:
        matrices = matrices_of(model)
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95), fused=True)
        momenta = [torch.zeros_like(p) for p in matrices]
        stacks: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(matrices):
            stacks.setdefault((len(p), p[0].numel()), []).append(i)

        @torch.no_grad()
        def step() -> None:
            gradients = [p.grad for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)
            torch._foreach_mul_(matrices, 1 - 0.02 * 0.1)
            for shape, members in stacks.items():
                x = torch.stack([ahead[i].view(shape) for i in members])
                x = newton_schulz(x)
                steps = [u.view(matrices[i].shape) for i, u in zip(members, x.unbind())]
                torch._foreach_add_(
                    [matrices[i] for i in members], steps, alpha=-0.02 * 0.2 * max(shape) ** 0.5
                )
            adamw.step()

        return step

    more: dict[str, Any] = {}
    if hasattr(torch.optim, "Muon"):

        def reference(model: nn.Module) -> Callable[[], Any]:
            matrices = matrices_of(model)
            known = {id(p) for p in matrices}
            muon = torch.optim.Muon(matrices, lr=0.02)
            adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in known], fused=True)
            return lambda: (muon.step(), adamw.step())

        more = {"reference": reference, "reference_name": "torch.optim.Muon, in bfloat16"}
    return step_case(host, (methods.Muon(),), by_hand, rtol=1e-3, **more)


def newton_schulz(x: Tensor) -> Tensor:
    """Five quintic iterations on a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# -- around an optimizer


@case("cautious_weight_decay", "conv", "gpt", foreach=True)
def _cautious_weight_decay(host: Host) -> Case:
    def by_hand(model: nn.Module) -> Callable[[], Any]:
        optimizer = plain_adamw(model, 0.0)
        decaying = [p for p in model.parameters() if p.ndim >= 2]

        @torch.no_grad()
        def step() -> None:
            before = [p.clone() for p in decaying]
            optimizer.step()
            allowed = torch._foreach_sub(before, decaying)
            torch._foreach_mul_(allowed, before)
            torch._foreach_sign_(allowed)
            torch._foreach_add_(allowed, 1.0)
            torch._foreach_clamp_max_(allowed, 1.0)
            torch._foreach_addcmul_(decaying, allowed, before, value=-2e-3 * 0.1)

        return step

    method = methods.CautiousWeightDecay()
    return step_case(
        host, (methods.AdamW(), method), by_hand, lambda model: plain_adamw(model).step, rtol=1e-6
    )


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """Hidden ones."""
    from stretto.models.roles import parameter_kinds

    kinds = parameter_kinds(model)
    return [p for name, p in model.named_parameters() if kinds[name] == "matrix"]


@case("hyperball", "conv", "gpt", foreach=True)
def _hyperball(host: Host) -> Case:
    def by_hand(model: nn.Module) -> Callable[[], Any]:
        optimizer = plain_adamw(model)
        matrices = matrices_of(model)
        radii = [p.detach().norm() for p in matrices]
        shorter = [2e-3 * radius for radius in radii]

        @torch.no_grad()
        def step() -> None:
            before = [p.clone() for p in matrices]
            optimizer.step()
            moves = torch._foreach_sub(before, matrices)
            torch._foreach_mul_(moves, torch._foreach_div(shorter, torch._foreach_norm(moves)))
            torch._foreach_sub_(before, moves)
            torch._foreach_mul_(before, torch._foreach_div(radii, torch._foreach_norm(before)))
            torch._foreach_copy_(matrices, before)

        return step

    return step_case(
        host,
        (methods.AdamW(), methods.Hyperball()),
        by_hand,
        lambda model: plain_adamw(model).step,
        rtol=1e-5,
    )


@case("update_floor", "conv", "gpt", foreach=True)
def _update_floor(host: Host) -> Case:
    floor = 20.0  # high enough to act beside Adam

    def by_hand(model: nn.Module) -> Callable[[], Any]:
        optimizer = plain_adamw(model)
        matrices = matrices_of(model)

        @torch.no_grad()
        def step() -> None:
            before = [p.clone() for p in matrices]
            least = torch.stack(torch._foreach_norm(before)) * (2e-3 * floor)
            optimizer.step()
            moves = torch._foreach_sub(matrices, before)
            longer = (least / torch.stack(torch._foreach_norm(moves))).clamp(min=1.0)
            torch._foreach_mul_(moves, list(longer.unbind()))
            torch._foreach_add_(before, moves)
            torch._foreach_copy_(matrices, before)

        return step

    return step_case(
        host,
        (methods.AdamW(), methods.UpdateFloor(floor)),
        by_hand,
        lambda model: plain_adamw(model).step,
        rtol=1e-5,
    )


def averaging(model: nn.Module, share: Callable[[], float]) -> Callable[[], Any]:
    """Schedule-Free and primal averaging: z steps from y, x averages z, the parameters hold y."""
    optimizer = plain_adamw(model, betas=(0.0, 0.95))
    y = list(model.parameters())
    z, x = ([p.detach().clone() for p in y] for _ in range(2))

    @torch.no_grad()
    def step() -> None:
        torch._foreach_sub_(z, y)
        optimizer.step()
        torch._foreach_add_(z, y)
        torch._foreach_lerp_(x, z, share())
        torch._foreach_copy_(y, torch._foreach_lerp(z, x, 0.9))

    return step


ADAMW = methods.AdamW(betas=(0.0, 0.95))


@case("schedule_free", "conv", "gpt", foreach=True)
def _schedule_free(host: Host) -> Case:
    def by_hand(model: nn.Module) -> Callable[[], Any]:
        count = 0

        def share() -> float:
            nonlocal count
            count += 1
            return 1 / count

        return averaging(model, share)

    method = methods.ScheduleFree()
    return step_case(
        host, (ADAMW, method), by_hand, lambda m: plain_adamw(m, betas=(0.0, 0.95)).step, rtol=1e-5
    )


@case("primal_averaging", "conv", "gpt", foreach=True)
def _primal_averaging(host: Host) -> Case:
    rate = 1 - 0.5 ** (1 / 100 / 0.02)
    method = methods.PrimalAveraging()
    return step_case(
        host,
        (ADAMW, method),
        lambda model: averaging(model, lambda: rate),
        lambda m: plain_adamw(m, betas=(0.0, 0.95)).step,
        rtol=1e-5,
    )


@case("ema_nesterov", "conv", "gpt", foreach=True)
def _ema_nesterov(host: Host) -> Case:
    rate = 1 - 0.5 ** (1 / 100 / 0.024)

    def by_hand(model: nn.Module) -> Callable[[], Any]:
        optimizer = plain_adamw(model)
        y = list(model.parameters())
        trend = [torch.zeros_like(p) for p in y]
        ahead = 0.0

        @torch.no_grad()
        def step() -> None:
            nonlocal ahead
            torch._foreach_mul_(trend, 1 - rate + rate * ahead)
            torch._foreach_sub_(trend, y, alpha=rate)
            optimizer.step()
            torch._foreach_add_(trend, y, alpha=rate)
            ahead = 0.3
            torch._foreach_add_(y, trend, alpha=ahead)

        return step

    method = methods.EMANesterov()
    return step_case(
        host, (methods.AdamW(), method), by_hand, lambda model: plain_adamw(model).step, rtol=1e-4
    )


@case("lookahead", "conv", "gpt", foreach=True)
def _lookahead(host: Host) -> Case:
    """Five steps, so that each run holds one return to the slow weights."""

    def by_hand(model: nn.Module) -> Callable[[], Any]:
        optimizer = plain_adamw(model)
        fast = list(model.parameters())
        slow = [p.detach().clone() for p in fast]
        count = 0

        def step() -> None:
            nonlocal count
            optimizer.step()
            count += 1
            if count % 5 == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(slow, fast, 0.5)
                    torch._foreach_copy_(fast, slow)

        return step

    method = methods.Lookahead()
    return step_case(
        host, (methods.AdamW(), method), by_hand, lambda m: plain_adamw(m).step, steps=5, rtol=1e-6
    )
