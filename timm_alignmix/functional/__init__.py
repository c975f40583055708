"""Mathematics of the papers on plain tensors, without nn.Module, device choice or global random state.

AlignMixup (Venkataramanan et al., CVPR 2022, arXiv 2103.15375) is cited as [A], MultiMix and Dense MultiMix
(Venkataramanan et al., NeurIPS 2023, arXiv 2311.05538) as [M]; equation numbers are theirs.
"""
from .attention import attention_map, class_activation
from .block_transport import block_transport, move_blocks
from .co_labels import alpha_expansion, co_mixup_labels
from .level_cut import level_cut
from .losses import BinaryCrossEntropy, dense_multimix_loss, dense_multimix_rows, multimix_loss
from .masks import box_around, box_sides, inside
from .saliency import fine_grained_saliency, gaussian_blur, greedy_cycle, shares, spectral_residual
from .targets import check_target, check_values, soft_target, soft_target_cross_entropy, target_mass
from .transport import align, align_to, sinkhorn_plan, transport_cost
from .weights import convex_weights

__all__ = [
    'BinaryCrossEntropy', 'align', 'align_to', 'alpha_expansion', 'attention_map', 'block_transport', 'box_around',
    'box_sides', 'check_target', 'check_values', 'class_activation', 'co_mixup_labels', 'convex_weights',
    'dense_multimix_loss', 'dense_multimix_rows', 'fine_grained_saliency', 'gaussian_blur', 'greedy_cycle', 'inside',
    'level_cut', 'move_blocks', 'multimix_loss', 'shares', 'sinkhorn_plan', 'soft_target',
    'soft_target_cross_entropy', 'spectral_residual', 'target_mass', 'transport_cost']
