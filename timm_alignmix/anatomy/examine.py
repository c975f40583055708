"""Places in a timm model where features can be mixed, and the layers between them and the logits.

They are found in a recorded forward pass of a copy and accepted if the copy gives the same logits through the split. A
model that cannot be split exactly is refused by name.

Shape suffixes: B batch, C classes, D channels, R spatial positions.
"""
from typing import Any

import timm
import torch
import torch.nn as nn

from .class_attention import ClassAttention
from .dense_head import DenseHead, HeadStep
from .layers import FeatureLayer, Layout, Patch, grid_of
from .trace import Call, Trace, UnsupportedModel, is_same


class Anatomy:
    """Places where a timm model can be mixed. A copy is examined once, on the model's device.

    Args:
        model: A timm classification model.
        img_size: Height and width of the images it is used with; None takes the size the model was built for.

    Raises:
        UnsupportedModel: The model has no classifier, or does not run at that size.

    Example:
        >>> anatomy = Anatomy(timm.create_model('test_resnet', num_classes=10), img_size=64)
        >>> anatomy.align_layer()
        FeatureLayer(name='layer3', layout=Layout(kind='NCHW', prefix=0), num_positions=16, before_pool=False)
    """

    def __init__(self, model: nn.Module, img_size: int | tuple[int, int] | None = None) -> None:
        self.model = model
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        self.name = cfg.get('architecture') or type(model).__name__
        self.num_classes = count_classes(model)
        self.input_size = _input_size(model, cfg, img_size)
        if any(p.is_meta for p in model.parameters()):
            raise UnsupportedModel(
                f'{self.name} is on the meta device, where it has no weights to examine; create it on another, or pass '
                'mix none, mixup or cutmix, which do not look into it')
        self._trace = Trace(model, self.name, self.input_size)

    def linear_heads(self) -> list[Call]:
        """Linear layers whose mean is the model's output.

        Raises:
            UnsupportedModel: The logits are not an affine function of an embedding.
        """
        heads = []
        for call in self._trace.calls:
            if isinstance(call.module, (nn.Linear, nn.Conv2d)) and isinstance(call.output, torch.Tensor):
                if call.output.shape[:2] == (2, self.num_classes) and call.output.numel() == 2 * self.num_classes:
                    heads.append(call)
        outputs = [call.output.reshape(2, self.num_classes) for call in heads]
        for call, output in zip(heads, outputs, strict=True):
            if is_same(output, self._trace.logits):
                return [call]
        if heads and is_same(torch.stack(outputs).mean(dim=0), self._trace.logits):
            return heads
        raise UnsupportedModel(
            f'{self.name}: the logits are not the output of linear layers (nor their mean), so mixing embeddings is '
            'not mixing logits; use mix none, mixup, cutmix, manifold or alignmix')

    def output_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a module's output for one image."""
        return tuple(self._trace.by_name[name].output.shape[1:])

    def stages(self) -> list[str]:
        """Module names of the model's stages or blocks, from input to output, without the stem."""
        names = [entry['module'] for entry in self._feature_info() if entry['module'] in self._trace.by_name]
        stem = ('act', 'stem', 'conv', 'bn', 'relu', 'norm', 'patch_embed')
        while len(names) > 2 and names[0].split('.')[0].rstrip('0123456789').startswith(stem):
            names = names[1:]
        if len(names) < 2:
            names = self._children_in_order()
        return names

    def _feature_info(self) -> list[dict[str, Any]]:
        info = getattr(self.model, 'feature_info', None) or []
        return [entry for entry in getattr(info, 'info', info) if isinstance(entry, dict) and 'module' in entry]

    def _children_in_order(self) -> list[str]:
        """Entries of the longest stage-like container, for models that list no features."""
        best: list[str] = []
        for attr in ('stages', 'layers', 'blocks', 'features', 'network', 'transformer'):
            container = getattr(self.model, attr, None)
            if isinstance(container, (nn.Sequential, nn.ModuleList)):
                names = [f'{attr}.{name}' for name, _ in container.named_children()]
                best = max(best, [name for name in names if name in self._trace.by_name], key=len)
        return best

    def is_isotropic(self) -> bool:
        """Check for blocks of one resolution, as in a plain ViT."""
        shapes = {getattr(self._trace.by_name[name].output, 'shape', None) for name in self.stages()}
        return len(self.stages()) > 4 and len(shapes) == 1

    def align_layer(self, at: str | int = 'auto') -> FeatureLayer:
        """Layer that AlignMixup mixes at.

        Args:
            at: 'auto' (the stem of LeViT, the end of a middle block of an isotropic model, else the last stage that
                another one follows), 'last' (the map that is pooled), the index of a stage or block, or the name of a
                module.

        Raises:
            UnsupportedModel: There is no such layer, or its features do not determine the logits alone.
        """
        if at == 'last':
            return self.layer(self.dense_head(allow_class_token=True).name)
        stages = self.stages()
        if at != 'auto':
            return self.layer(self._stage(at, stages))
        if 'Levit' in type(self.model).__name__:
            return self.layer('stem')
        middle = len(stages) // 2 - 1
        candidates = stages[middle::-1] if self.is_isotropic() else stages[-2::-1]
        return self._first(candidates)

    def manifold_layers(self) -> list[FeatureLayer]:
        """Default layers of manifold mixup besides the input: ends of stages 1 and 2, or of blocks d/3 and 2d/3."""
        stages = self.stages()
        if self.is_isotropic():
            depth = len(stages)
            return [self.layer(stages[max(depth * k // 3 - 1, 0)]) for k in (1, 2)]
        layers = []
        for name in stages[:-1]:
            try:
                layers.append(self.layer(name))
            except UnsupportedModel:
                continue
            if len(layers) == 2:
                break
        return layers or [self._first(stages)]

    def _stage(self, at: str | int, stages: list[str]) -> str:
        if isinstance(at, int) or at.lstrip('-').isdigit():
            if not -len(stages) <= int(at) < len(stages):
                raise UnsupportedModel(f'{self.name} has {len(stages)} stages or blocks, and none with number {at}')
            return stages[int(at)]
        return at

    def _first(self, names: list[str]) -> FeatureLayer:
        reasons = []
        for name in names:
            try:
                layer = self.layer(name)
                if layer.num_positions > 1 and not layer.before_pool:
                    return layer
                reasons.append(f'{name}: ' + ('goes straight into pooling' if layer.before_pool else 'one position'))
            except UnsupportedModel as e:
                reasons.append(str(e).removeprefix(f'{self.name}: '))
        raise UnsupportedModel(f'{self.name} has no layer to mix positions at: ' + ('; '.join(reasons) or 'no stages'))

    def layer(self, name: str) -> FeatureLayer:
        """Module as a place to mix, after a check that its output alone determines the logits.

        Raises:
            UnsupportedModel: The module does not exist, is called more than once, has no feature map as output, or is
                by-passed.
        """
        call = self._trace.by_name.get(name)
        if call is None:
            known = dict(self.model.named_modules())
            why = 'is not called exactly once in a forward pass' if name in known else 'does not exist'
            raise UnsupportedModel(f'{self.name}: module {name!r} {why}; its stages are {", ".join(self.stages())}')
        layout = self._layout(call)
        if not self._trace.cuts(call):
            raise UnsupportedModel(
                f'{self.name}: the output of {name!r} does not determine the logits alone, features by-pass it')
        feat_BDR = layout.positions(call.output)
        pooled = [feat_BDR.mean(dim=2)]
        if layout.prefix:
            pooled += call.output[:, :layout.prefix].unbind(dim=1)
        vectors = self._vectors(feat_BDR.shape[1])
        before_pool = any(is_same(p, v) for p in pooled for v in vectors)
        return FeatureLayer(name, layout, feat_BDR.shape[2], before_pool)

    def _vectors(self, channels: int) -> list[torch.Tensor]:
        """Pooled vectors that modules take as input, as (2, D)."""
        vectors = []
        for call in self._trace.calls:
            for x in call.inputs[:1]:
                if isinstance(x, torch.Tensor) and x.shape[0] == 2 and x.numel() == 2 * channels:
                    vectors.append(x.reshape(2, channels))
        return vectors

    def _layout(self, call: Call) -> Layout:
        x = call.output
        if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4) or x.shape[0] != 2:
            what = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise UnsupportedModel(f'{self.name}: the output of {call.name!r} is {what}, not a feature map')
        if x.ndim == 4:
            return Layout(self._image_layout(call.name, x))
        prefix = self._prefix_tokens(x.shape[1])
        if prefix is None:
            raise UnsupportedModel(
                f'{self.name}: the {x.shape[1]} tokens of {call.name!r} are not a grid of the image plus the model\'s '
                f'{getattr(self.model, "num_prefix_tokens", 0)} prefix tokens')
        return Layout('NLC', prefix)

    def _image_layout(self, name: str, x: torch.Tensor) -> str:
        expected = next((entry['num_chs'] for entry in self._feature_info() if entry['module'] == name), None)
        if expected in (x.shape[1], x.shape[3]) and x.shape[1] != x.shape[3]:
            return 'NCHW' if expected == x.shape[1] else 'NHWC'
        # Square images are far more common than feature maps with as many channels as rows.
        if (x.shape[2] == x.shape[3]) != (x.shape[1] == x.shape[2]):
            return 'NCHW' if x.shape[2] == x.shape[3] else 'NHWC'
        fmt = getattr(self.model, 'output_fmt', None)
        return 'NHWC' if str(getattr(fmt, 'value', fmt)) == 'NHWC' else 'NCHW'

    def _prefix_tokens(self, tokens: int) -> int | None:
        """Number of leading tokens without a position: those left over by a grid of the image's shape."""
        claimed = int(getattr(self.model, 'num_prefix_tokens', 0) or 0)
        for prefix in dict.fromkeys((claimed, 0, 1, 2)):
            if grid_of(tokens - prefix, *self.input_size[1:]):
                return prefix
        return None

    def patch(self) -> Patch:
        """Patches that the model divides images into.

        Raises:
            UnsupportedModel: It divides them into none.
        """
        size = getattr(getattr(self.model, 'patch_embed', None), 'patch_size', None)
        if size is None:
            raise UnsupportedModel(
                f'{self.name} does not divide images into patches (it has no patch_embed.patch_size), which the method '
                'mixes; use a vision transformer, or mix cutmix')
        return Patch(size, size) if isinstance(size, int) else Patch(*size)

    def class_attention(self) -> ClassAttention:
        """Attention of the class token in the last block.

        Raises:
            UnsupportedModel: The model does not classify a class token, or its attention is of an unknown form.
        """
        try:
            layout, is_token = self._pooled_map([self._chain(head)[1] for head in self.linear_heads()])[1:]
        except UnsupportedModel:
            is_token = False
        if not is_token:
            raise UnsupportedModel(
                f'{self.name} does not classify a class token, whose attention the method needs; use a model that does '
                "(ViT, DeiT, CaiT, XCiT; BEiT and EVA with global_pool='token'), or mix cutmix")
        call = next((c for c in reversed(self._trace.calls) if hasattr(c.module, 'attn_drop')), None)
        for name in (f'{call.name}.qkv', call.name) if call else ():
            if name in self._trace.by_name and (found := self._prove_attention(name, call, layout.prefix)):
                return found
        raise UnsupportedModel(
            f'{self.name}: the attention of its class token ({type(call.module).__name__ if call else "no module"}) is '
            'not the softmax of queries and keys that can be computed again; use another model, or mix cutmix')

    def _prove_attention(self, name: str, call: Call, prefix: int) -> ClassAttention | None:
        """Attention from calls of the module `name`, if that is the one the copy computes."""
        computed, expected = [], []
        trial = ClassAttention(name, call.module, prefix, Patch(1, 1))
        call.module.fused_attn = False  # only so does the copy pass its attention to a module
        handles = [
            call.module.attn_drop.register_forward_pre_hook(lambda module, args: expected.append(args[0])),
            self._trace.copy.get_submodule(name).register_forward_hook(
                lambda module, *called: computed.append(trial.read(*called)), with_kwargs=True)]
        try:
            self._trace.run()
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None  # of another form
        finally:
            for handle in handles:
                handle.remove()
        if not computed or not expected or expected[0].ndim != 4:
            return None
        row_BR = expected[0][:, :, 0].mean(dim=1)[:, prefix:]
        grid = grid_of(row_BR.shape[1], *self.input_size[1:])
        # Attention of an untrained network is nearly uniform: what counts is how it differs from that.
        if grid is None or computed[0].shape != row_BR.shape or not is_same(
                *(row - row.mean(dim=1, keepdim=True) for row in (computed[0], row_BR))):
            return None
        patch = Patch(self.input_size[1] / grid[0], self.input_size[2] / grid[1])
        return ClassAttention(name, self.model.get_submodule(call.name), prefix, patch)

    def dense_head(self, allow_class_token: bool = False) -> DenseHead:
        """Head as a function of one position.

        Args:
            allow_class_token: Accept a model that classifies its class token, and apply its head to patch tokens.

        Raises:
            UnsupportedModel: The head is not pooling followed by modules that act on one vector.
        """
        heads = self.linear_heads()
        chains = [self._chain(head) for head in heads]
        pooled = [vector for _, vector in chains]
        name, layout, token = self._pooled_map(pooled)
        if token and not allow_class_token:
            raise UnsupportedModel(
                f'{self.name} classifies its class token, which dense mixing would leave to the input-mixup half; '
                "create it with global_pool='avg', class_token=False, fc_norm=False where its family takes them (plain "
                'ViTs), or pass allow_class_token=True to insist')
        positions: dict[tuple[int, ...], int] = {
            self.input_size: layout.positions(self._trace.by_name[name].output).shape[2]}
        if positions[self.input_size] < 2:
            raise UnsupportedModel(
                f'{self.name} has one position before its classifier, so nothing to mix densely; use mix multimix')
        trial = DenseHead(self._trace.copy, name, layout, [steps for steps, _ in chains], positions)
        exact_mean = self._prove_dense(trial)
        branches = [
            [HeadStep(self.model.get_submodule(self._trace.path_of(step.module)), step.shape) for step in steps]
            for steps, _ in chains]
        head = DenseHead(self.model, name, layout, branches, positions)
        head.exact_mean = exact_mean and not token
        return head

    def _chain(self, head: Call) -> tuple[list[HeadStep], torch.Tensor]:
        """Leaf modules between the pooled vector and a linear head, and that vector, (2, D)."""
        steps, call, index = [], head, self._trace.calls.index(head)
        while True:
            x = call.inputs[0]
            steps.append(HeadStep(call.module, tuple(x.shape[1:])))
            vector = x.reshape(2, -1)
            previous = next((
                i for i in range(index - 1, -1, -1)
                if self._trace.calls[i].is_leaf and _is_same_memory(self._trace.calls[i].output, x)), None)
            if previous is None:
                break
            call, index = self._trace.calls[previous], previous
            if not call.inputs or not _is_vector(call.inputs[0]):
                break
        return [s for s in reversed(steps) if not isinstance(s.module, (nn.Identity, nn.Flatten))], vector

    def _pooled_map(self, vectors: list[torch.Tensor]) -> tuple[str, Layout, bool]:
        """Last feature map that is pooled to the vectors: its module, layout, and whether by a class token."""
        for call in reversed(self._trace.calls):
            x = call.output
            if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4) or x.shape[0] != 2 or _is_vector(x):
                continue
            for layout in self._possible_layouts(x):
                feat_BDR = layout.positions(x)
                if feat_BDR.shape[2] and all(
                        v.shape[1] == feat_BDR.shape[1] and is_same(feat_BDR.mean(dim=2), v) for v in vectors):
                    if self._trace.cuts(call):
                        return call.name, layout, False
            if x.ndim == 3 and all(
                    v.shape[1] == x.shape[2] and any(is_same(x[:, t], v) for t in range(min(2, x.shape[1])))
                    for v in vectors):
                prefix = self._prefix_tokens(x.shape[1])
                if prefix and self._trace.cuts(call):
                    return call.name, Layout('NLC', prefix), True
        raise UnsupportedModel(
            f'{self.name}: at {self.input_size[1]}x{self.input_size[2]} pixels its classifier does not see the mean '
            'over two or more positions of a feature map; use larger images if one position is left, or mix multimix')

    def _possible_layouts(self, x: torch.Tensor) -> list[Layout]:
        if x.ndim == 4:
            return [Layout('NCHW'), Layout('NHWC')]
        prefix = int(getattr(self.model, 'num_prefix_tokens', 0) or 0)
        return [Layout('NLC', p) for p in dict.fromkeys((prefix, 0)) if p < x.shape[1]]

    @torch.no_grad()
    def _prove_dense(self, head: DenseHead) -> bool:
        """Check that a constant map gives the model's own logits at each position; return whether means agree too."""
        call = self._trace.by_name[head.name]
        feat_BDR = head.layout.positions(call.output)
        flat_BDR = feat_BDR.mean(dim=2, keepdim=True).expand_as(feat_BDR)
        prefix = flat_BDR[:, :, :1].transpose(1, 2).expand(-1, head.layout.prefix, -1)
        flat = head.layout.restore(flat_BDR, call.output, prefix).contiguous()
        logits_BC = self._trace.logits_with(head.name, flat)
        dense_BRC, _ = head(flat)
        if not is_same(dense_BRC, logits_BC.unsqueeze(1).expand_as(dense_BRC)):
            raise UnsupportedModel(
                f'{self.name}: its head is more than a chain of modules after pooling and cannot be applied to one '
                'position; use mix multimix')
        return is_same(head(call.output)[0].mean(dim=1), self._trace.logits)


def _is_vector(x: Any) -> bool:
    """Check for (B, D) with any number of dimensions of size 1."""
    return isinstance(x, torch.Tensor) and sum(n > 1 for n in x.shape[1:]) <= 1


def _is_same_memory(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.numel() == b.numel() and a.data_ptr() == b.data_ptr()


def _input_size(model: nn.Module, cfg: dict[str, Any], img_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    channels, *size = cfg.get('input_size') or (3, 224, 224)
    channels = getattr(model, 'in_chans', channels)
    if img_size is None:
        img_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or tuple(size)
    if isinstance(img_size, int):
        img_size = (img_size, img_size)
    return channels, *img_size


def count_classes(model: nn.Module, given: int | None = None) -> int:
    """Number of classes of a model: the given one, or that of a timm model.

    Raises:
        UnsupportedModel: It has no classifier, or no number is given and it is no timm model.
    """
    name = type(model).__name__
    if getattr(model, 'num_classes', None) == 0:
        raise UnsupportedModel(f'{name} has no classifier (num_classes=0); create it with num_classes > 0')
    if given is not None:
        return given
    if hasattr(model, 'timm_model'):
        raise UnsupportedModel(f'{name} is not a timm model but holds one: pass its .timm_model')
    if not hasattr(model, 'num_classes'):
        raise UnsupportedModel(
            f"{name} is not a timm model (it has no num_classes): methods that mix images only, such as "
            "timm_alignmix.create_mixup('mixup', model, num_classes=...) or mix 'cutmix' of MixTask(..., "
            "num_classes=...), train any network; the others need a timm model")
    return model.num_classes


def dense_model_kwargs(model_name: str) -> dict[str, Any]:
    """Arguments of timm.create_model that fit a plain ViT for dense mixing.

    With a class token, or a norm after pooling, inference uses another vector than the mean of those that dense mixing
    trains.

    Args:
        model_name: Name of a timm model.

    Returns:
        The arguments; empty if the model needs none or does not take them.

    Example:
        >>> dense_model_kwargs('vit_small_patch16_224')
        {'global_pool': 'avg', 'class_token': False, 'fc_norm': False}
        >>> dense_model_kwargs('resnet50')
        {}
    """
    kwargs: dict[str, Any] = dict(global_pool='avg', class_token=False, fc_norm=False)
    with torch.device('meta'):
        model = timm.create_model(model_name)
        if getattr(model, 'global_pool', None) != 'token' or not hasattr(model, 'fc_norm'):
            return {}
        try:
            timm.create_model(model_name, **kwargs)
        except (TypeError, AssertionError):
            return {}
    return kwargs


