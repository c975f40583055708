"""The papers' equations as they are printed, in float64: the reference every test here compares with.

Plain loops, everything materialised, no closed form, no shared helper with the package. Slow on purpose. Gradients come
from autograd through these forms. [A] is AlignMixup (arXiv 2103.15375), [M] is MultiMix / Dense MultiMix
(arXiv 2311.05538); equation numbers are theirs.

Shapes: B batch, C classes, D channels, R positions, N generated examples.
"""
import math

import torch
from torch import Tensor


def one_hot_targets(target: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """(B,) labels or (B, C) rows -> (B, C) float64 rows: `smoothing` of the mass spread over all classes."""
    if target.ndim == 1:
        rows = torch.zeros(len(target), num_classes, dtype=torch.float64)
        for i, label in enumerate(target.tolist()):
            rows[i, label] = 1.0
    else:
        rows = target.double()
    return (1.0 - smoothing) * rows + smoothing / num_classes


def cross_entropy(logits_C: Tensor, target_C: Tensor) -> Tensor:
    """Cross-entropy of one example with a target distribution."""
    log_prob_C = logits_C - torch.logsumexp(logits_C, 0)
    return -(target_C * log_prob_C).sum()


def multimix_loss(
        Z_DB: Tensor, W_CD: Tensor, b_C: Tensor, Y_BC: Tensor, lam_NB: Tensor, loss_of=cross_entropy) -> Tensor:
    """[M] (6)-(8): mix embeddings and targets, classify each mixed embedding, average over the N of them."""
    mixed_DN = Z_DB @ lam_NB.T
    mixed_Y_CN = Y_BC.T @ lam_NB.T
    losses = [loss_of(W_CD @ mixed_DN[:, k] + b_C, mixed_Y_CN[:, k]) for k in range(lam_NB.shape[0])]
    return torch.stack(losses).mean()


def dense_multimix_loss(
        Z_BDR: Tensor,
        W_CD: Tensor,
        b_C: Tensor,
        Y_BC: Tensor,
        lam_RNB: Tensor,
        attention_BR: Tensor,
        loss_of=cross_entropy,
) -> Tensor:
    """[M] (10)-(14): one factor matrix per position, columns normalised, normaliser s, mean over attended positions."""
    nothing = (Z_BDR.sum() + W_CD.sum() + b_C.sum()) * 0.0
    position_losses = []
    for j in range(Z_BDR.shape[2]):
        if not attention_BR[:, j].any():
            continue
        M_BN = torch.diag(attention_BR[:, j]) @ lam_RNB[j].T  # (10)
        s_N = M_BN.sum(0)
        weighted, total = [], []
        for k in range(s_N.shape[0]):
            if s_N[k].item() == 0:
                continue
            column_B = M_BN[:, k] / s_N[k]  # (11)
            mixed_D = Z_BDR[:, :, j].T @ column_B  # (12)
            mixed_Y_C = Y_BC.T @ column_B  # (13)
            weighted.append(s_N[k] * loss_of(W_CD @ mixed_D + b_C, mixed_Y_C))
            total.append(s_N[k])
        # Attended, yet by no vector (small m or N): every column is empty, so the position's loss is 0.
        position_losses.append(torch.stack(weighted).sum() / torch.stack(total).sum() if total else nothing)  # (14)
    if not position_losses:
        return nothing
    return torch.stack(position_losses).mean()


def attention_map(z_BDR: Tensor, u_BD: Tensor | None, normalize: str) -> Tensor:
    """[M] (9): a = h(z^T u), h = ReLU then l1 normalisation, or softmax; uniform where there is no u."""
    B, _, R = z_BDR.shape
    rows = []
    for i in range(B):
        if u_BD is None:
            rows.append(torch.full((R,), 1.0 / R, dtype=torch.float64))
            continue
        similarity_R = torch.stack([(z_BDR[i, :, j] * u_BD[i]).sum() for j in range(R)])
        if normalize == 'softmax':
            rows.append(torch.softmax(similarity_R, 0))
        else:
            positive_R = torch.relu(similarity_R)
            mass = positive_R.sum()
            rows.append(positive_R / mass if mass.item() > 0 else positive_R)
    return torch.stack(rows)


def transport_cost(a_BDR: Tensor, b_BDR: Tensor) -> Tensor:
    """[A] (6): squared Euclidean distance between every position of one map and every position of the other."""
    B, _, R = a_BDR.shape
    cost_BRR = torch.zeros(B, R, b_BDR.shape[2], dtype=torch.float64)
    for n in range(B):
        for i in range(R):
            for j in range(b_BDR.shape[2]):
                cost_BRR[n, i, j] = (a_BDR[n, :, i].double() - b_BDR[n, :, j].double()).pow(2).sum()
    return cost_BRR


def sinkhorn_plan(cost_BRR: Tensor, eps: float, iterations: int, final_marginal: str) -> Tensor:
    """[A] (7)(8): entropic transport between uniform marginals, Sinkhorn-Knopp on log potentials.

    Potentials start at 0; one iteration normalises one side, then the side named by `final_marginal`. No iteration
    leaves one softmax of -cost / eps ([A] Table 10).
    """
    plans = []
    for cost_RR in cost_BRR.double():
        if final_marginal == 'columns':
            cost_RR = cost_RR.T
        R = cost_RR.shape[0]
        log_K = -cost_RR / eps
        if iterations == 0:
            plan_RR = torch.softmax(log_K, 1) / R
        else:
            f_R = torch.zeros(R, dtype=torch.float64)
            for _ in range(iterations):
                g_R = -math.log(R) - torch.logsumexp(log_K + f_R[:, None], 0)
                f_R = -math.log(R) - torch.logsumexp(log_K + g_R[None, :], 1)
            plan_RR = torch.exp(f_R[:, None] + log_K + g_R[None, :])
        plans.append(plan_RR.T if final_marginal == 'columns' else plan_RR)
    return torch.stack(plans)


def align(a_BDR: Tensor, b_BDR: Tensor, plan_ab_BRR: Tensor, plan_ba_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """[A] (9)(10) with given plans, R_ = positions * plan: A~ = A' R_^T and A~' = A R_, written position by position.

    Row i of a plan belongs to position i of A, column j to position j of A'.
    """
    B, D, R = a_BDR.shape
    ab_BDR = torch.stack([
        torch.stack([
            sum(R * plan_ab_BRR[n, i, j] * b_BDR[n, :, j] for j in range(R)) for i in range(R)
        ], dim=1) for n in range(B)
    ])
    ba_BDR = torch.stack([
        torch.stack([
            sum(R * plan_ba_BRR[n, i, j] * a_BDR[n, :, i] for i in range(R)) for j in range(R)
        ], dim=1) for n in range(B)
    ])
    return ab_BDR, ba_BDR
