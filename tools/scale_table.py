"""Write the table of docs/scale.md: step time and communication at many GPUs, by arithmetic.

    python tools/scale_table.py

Models are built on the meta device; nothing is measured. The rates stand in RATES, their sources on the page.
"""
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

PAGE = Path(__file__).parents[1] / 'docs' / 'scale.md'
START, END = '<!-- written by tools/scale_table.py -->', '<!-- end -->'
RATES = {
    'flops': 989e12,  # bf16 of an H100 SXM, a second
    'share': 0.35,  # of it that a whole step reaches; ResNet-50 is bound by memory instead:
    'resnet50': 3000,  # images a second and GPU
    'nvlink': 380e9,  # bytes a second that leave a GPU for others of its machine
    'network': 50e9,  # bytes a second that leave a GPU for other machines
}
NODE = 8  # GPUs of a machine
MODELS = {'resnet50': 256, 'vit_large_patch16_224': 64, 'vit_7b_patch16_dinov3': 16}  # images a GPU and step
GPUS = (8, 64, 512)
STATE = 4 + 4 + 8 + 4  # bytes a parameter: weights, gradients, AdamW's averages, moving average; all float32


def measure(name: str) -> tuple[int, float]:
    """Parameters, and operations of a forward pass on an image; a multiply-add counts as two."""
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=1000).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *model.pretrained_cfg['input_size']))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def compute_seconds(name: str, flops: float, images: int) -> float:
    """Forward and backward pass of a GPU, the latter twice the former."""
    if name in RATES:
        return images / RATES[name]
    return 3 * flops * images / (RATES['flops'] * RATES['share'])


def exchange_seconds(size: float, gpus: int) -> float:
    """All-gather or reduce-scatter of `size` bytes over all GPUs: within machines, and between them over all cards."""
    nodes = gpus // NODE
    within = size * (NODE - 1) / NODE / RATES['nvlink']
    return within + size * (nodes - 1) / nodes / (NODE * RATES['network'])


def exchanged_bytes(parameters: int) -> int:
    """What every GPU sends and receives in a step, whatever the strategy.

    DDP sums float32 gradients: a reduce-scatter and an all-gather of 4 bytes a parameter. FSDP gathers the weights in
    bfloat16 for either pass and reduce-scatters the gradients in float32: 2 + 2 + 4. HSDP does the latter within
    machines and sums float32 shards over them, each GPU over its own card.
    """
    return 8 * parameters


def table() -> str:
    lines = [
        '| model | parameters | images a GPU | passes (ms) | exchange at '
        + ' / '.join(map(str, GPUS)) + ' GPUs (ms) | images/s at ' + ' / '.join(map(str, GPUS))
        + ' | state a GPU (GB), DDP | FSDP at ' + ' / '.join(map(str, GPUS)) + ' |',
        '|---|' + 7 * '---:|']
    for name, images in MODELS.items():
        parameters, flops = measure(name)
        passes = compute_seconds(name, flops, images)
        times = [exchange_seconds(exchanged_bytes(parameters), gpus) for gpus in GPUS]
        rates = [gpus * images / max(passes, seconds) for gpus, seconds in zip(GPUS, times, strict=True)]
        state = STATE * parameters / 1e9
        cells = (
            f'`{name}`', f'{parameters / 1e6:,.0f} M', images, f'{1e3 * passes:.0f}',
            ' / '.join(f'{1e3 * seconds:.1f}' for seconds in times), ' / '.join(f'{rate:,.0f}' for rate in rates),
            f'{state:.1f}', ' / '.join(f'{state / gpus:.2g}' for gpus in GPUS))
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def main() -> None:
    text = PAGE.read_text(encoding='utf-8')
    before, _, rest = text.partition(START)
    PAGE.write_text(f'{before}{START}\n\n{table()}\n\n{END}{rest.partition(END)[2]}', encoding='utf-8')


if __name__ == '__main__':
    main()
