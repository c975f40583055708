"""Export of a trained model as a folder that plain timm loads, with the facts of its own training."""
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import nn

from .card import PAPERS, make_card
from .folder import CARD, CONFIG, WEIGHTS, verify

# Entries of a pretrained_cfg that describe the network and its images. All others say where weights came from, and
# would be the source's, not ours.
_KEPT = (
    'num_classes', 'input_size', 'fixed_input_size', 'min_input_size', 'pool_size', 'interpolation', 'crop_pct',
    'crop_mode', 'mean', 'std', 'first_conv', 'classifier')


def export(
        model: nn.Module, folder: str | Path, *, dataset: str | None = None, license: str = 'unknown',
        data_config: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
        class_names: list[str] | None = None) -> Path:
    """Write `model.safetensors`, `config.json` and a model card, for `timm.create_model('local-dir:FOLDER')`.

    The arguments the network was built with are kept, so timm builds the same one. The files appear in the folder once
    they have been checked against each other.

    Args:
        model: A timm model.
        folder: Where to write; files of an earlier export are replaced.
        dataset: Short name of the data set, for the tag.
        license: Licence of the weights. Nothing is inherited: whoever trained them decides.
        data_config: Preprocessing (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`); None takes what timm
            resolves for the model.
        training: Facts to record, such as `mix`, `mix_options`, `recipe`.
        class_names: Names of the classes, in order.

    Returns:
        The folder.

    Raises:
        ValueError: The files do not fit each other.
        OSError: The folder cannot be written.

    Example:
        >>> import tempfile, timm
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(model, folder, dataset='digits', training={'mix': 'alignmix'})
        ...     timm.create_model(f'local-dir:{folder}', pretrained=True).pretrained_cfg['tag']
        'alignmix_digits'
    """
    folder, model = Path(folder), unwrap_model(model)
    facts = {**({'dataset': dataset} if dataset else {}), **(training or {})}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export.', dir=folder) as temporary:
        draft = Path(temporary)
        hook = model.register_state_dict_post_hook(_for_safetensors)
        try:
            save_for_hf(model, str(draft), model_config={'label_names': class_names}, safe_serialization=True,
                        data_config=data_config)
        finally:
            hook.remove()
        config = json.loads((draft / CONFIG).read_text(encoding='utf-8'))
        kept = {key: value for key, value in config['pretrained_cfg'].items() if key in _KEPT}
        own = {
            'tag': make_tag(facts),
            'description': _describe(config['architecture'], facts),
            'license': license,
            'paper_ids': f'arXiv:{PAPERS[facts["mix"]][0]}' if facts.get('mix') in PAPERS else None,
        }
        config['pretrained_cfg'] = {**kept, **{key: value for key, value in own.items() if value}}
        config['training'] = json.loads(json.dumps(facts, default=str))  # as it will be read
        write_json(draft / CONFIG, config)
        (draft / CARD).write_text(make_card(config), encoding='utf-8')
        verify(draft)
        (draft / WEIGHTS).chmod(0o644)  # safetensors writes files for their owner only
        for name in (WEIGHTS, CONFIG, CARD):
            os.replace(draft / name, folder / name)
    return folder


def make_tag(facts: dict[str, Any]) -> str | None:
    """{mix}_{dataset} in the characters of timm's tags, or None where one of them is not known."""
    if not facts.get('mix') or not facts.get('dataset'):
        return None
    return re.sub(r'[^a-z0-9]+', '_', f'{facts["mix"]}_{facts["dataset"]}'.lower()).strip('_')


def _describe(architecture: str, facts: dict[str, Any]) -> str:
    mix = {None: '', 'none': ' without mixing'}.get(facts.get('mix'), f' with {facts.get("mix")}')
    return f'{architecture} trained{mix}' + (f' on {facts["dataset"]}' if 'dataset' in facts else '') + '.'


def _for_safetensors(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
    """Copy the tensors of a state dict so that they share no memory and are contiguous, as safetensors requires."""
    for key, value in state.items():
        state[key] = value.detach().clone(memory_format=torch.contiguous_format).cpu()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as timm does."""
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
