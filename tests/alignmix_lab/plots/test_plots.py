"""Every picture from its command or function: what is drawn is what the mathematics says, on tiny models."""
import numpy as np
import ot
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip('accelerate')
pytest.importorskip('matplotlib')

from alignmix_lab import plots
from alignmix_lab.commands.plot import main
from alignmix_lab.plots.alignment import _grid_height
from alignmix_lab.plots.attention import position_shares
from alignmix_lab.plots.gallery import input_mixes, mixed_pairs
from alignmix_lab.plots.images import network_input, to_pixels
from timm_alignmix import MixTask
from timm_alignmix.anatomy import feature_map
from timm_alignmix.functional import attention_map


@pytest.fixture
def photos(tmp_path):
    """Four images of different sizes and colours, two in each of two folders."""
    files = []
    for i, folder in enumerate(('cat', 'cat', 'dog', 'dog')):
        (tmp_path / folder).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40 + 5 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / f'{i}.png')
        files.append(tmp_path / folder / f'{i}.png')
    return files


def tiny(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


def drawn(figure):
    """All images of a figure, by title of their axes."""
    figure.draw_without_rendering()
    return {ax.get_title(): ax.images[0].get_array() for ax in figure.axes if ax.images and ax.get_title()}


def test_images_are_found_spread_and_read(photos, tmp_path):
    assert plots.find_images([tmp_path], 4) == photos
    assert plots.find_images([tmp_path / 'dog', photos[0]], 3) == [*photos[2:], photos[0]]
    assert plots.find_images([tmp_path], 2) == [photos[0], photos[3]]
    with pytest.raises(ValueError, match='needs 9 images, got 4'):
        plots.find_images([tmp_path], 9)
    with pytest.raises(ValueError, match='no such file or folder'):
        plots.find_images([tmp_path / 'fish'], 1)
    pixels = plots.read_images(photos, 32)
    assert pixels.shape == (4, 3, 32, 32) and 0 <= pixels.min() and pixels.max() <= 1
    model = tiny()
    normalised = network_input(model, pixels)
    assert not torch.allclose(normalised, pixels, atol=0.1)
    torch.testing.assert_close(to_pixels(model, normalised), pixels)


def test_gallery_mixes_as_the_targets_say():
    """A black and a white image: the mean of every mixed image is the weight of the white one."""
    pixels = torch.stack([torch.zeros(3, 20, 20), torch.ones(3, 20, 20)])
    for name in set(input_mixes()) - {'cutout'}:
        for image, lam, _ in mixed_pairs(name, pixels, (0.9, 0.5)):
            assert image.mean().item() == pytest.approx(1 - lam, abs=1 / 400), name
    assert [round(lam, 1) for _, lam, _ in mixed_pairs('mixup', pixels, (0.9, 0.5, 0.3))] == [0.9, 0.5, 0.3]
    figure = plots.gallery(pixels, ('dark', 'light'), lams=(0.75, 0.5))
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == input_mixes()
    titles = drawn(figure)
    assert {'A: dark', 'B: light'} <= set(titles)
    assert [*drawn(plots.gallery(pixels, ('dark', 'light'), lams=[0.5]))] == ['dark', 'light', *input_mixes()]
    row = input_mixes().index('cutout')
    assert len([ax for ax in figure.axes if ax.images and ax.get_subplotspec().rowspan.start == row]) == 3  # one mix


def test_gallery_has_all_methods_that_mix_images():
    assert {'mixup', 'cutmix', 'saliencymix', 'puzzlemix', 'comixup', 'zeta'} <= set(input_mixes())
    assert not {'none', 'manifold', 'alignmix', 'alignmix_ae', 'multimix', 'densemultimix'} & set(input_mixes())


def test_alignment_draws_the_plan():
    """The matrix is POT's plan, at an eps where both converge; chosen positions are lit where their mass goes."""
    model, pixels = tiny().eval(), torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    eps = 20.0
    figure = plots.alignment(model, pixels, layer='layer3', positions=[(0, 1), (3, 5)], eps=eps, iterations=500)
    feats = feature_map(model, 'layer3', network_input(model, pixels)).flatten(2).double()
    assert feats.shape[2] == 24 and _grid_height(24, 64 / 96) == 4
    cost = ((feats[0][:, :, None] - feats[1][:, None]) ** 2).sum(0)
    uniform = torch.full((24,), 1 / 24, dtype=torch.float64)
    plan = 24 * ot.sinkhorn(uniform, uniform, cost, eps, 'sinkhorn_log', numItermax=2000, stopThr=1e-12)
    images = drawn(figure)
    np.testing.assert_allclose(images['plan at layer3 (4x6)\nrows: positions of A'], plan.numpy(), atol=2e-4)
    lit = images['A2 goes to'].mean(axis=2)[8::16, 8::16]  # centres of the cells
    assert lit.shape == (4, 6)
    best = int(plan[3 * 6 + 5].argmax())
    row, column = divmod(best, 6)
    expected = pixels[1][:, 16 * row + 8, 16 * column + 8].mean()
    assert lit[row, column] == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match=r'not all in the 4x6 map'):
        plots.alignment(model, pixels, layer='layer3', positions=[(4, 0)])


def test_shares_of_positions():
    """With one example attending everywhere alone, it has all; without attention all have the same."""
    attention = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    shares = position_shares(attention, 500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shares[:, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(shares[:, 2], torch.tensor([0.0, 1.0]))
    assert abs(shares[0, 1] - 0.5) < 0.05


@pytest.mark.parametrize('name,kwargs', [
    ('test_resnet', {}), ('test_vit', dict(img_size=64, global_pool='avg', class_token=False, fc_norm=False)),
])
def test_attention_lights_the_attended_positions(name, kwargs):
    model, pixels = tiny(name, **kwargs), torch.rand(2, 3, 64, 64)
    figure = plots.attention(model, pixels, n=50, class_names=list('abcde'))
    assert len(figure.axes) == 12 and figure.axes[0].get_title() in list('abcde')
    if name == 'test_resnet':
        maps = attention_map(feature_map(model, 'layer4', network_input(model, pixels)).flatten(2), 'gap', 'relu')
        lit = drawn(figure)['GAP, relu (default)'].mean(axis=2)
        quadrants = torch.tensor([[lit[r:r + 32, c:c + 32].mean() for c in (0, 32)] for r in (0, 32)])
        assert quadrants.argmax() == maps[0].argmax()


def test_hull_holds_what_is_mixed():
    model, pixels = tiny(), torch.rand(5, 3, 64, 64)
    figure = plots.hull(model, pixels, names=list('abcde'), n=200)
    left, right = figure.axes
    polygon = left.patches[0].get_path()
    for ax in (left, right):
        points = ax.collections[0].get_offsets()
        assert polygon.contains_points(points, radius=1e-4).all() or polygon.contains_points(points, radius=-1e-4).all()
    assert len(left.collections[0].get_offsets()) == 5 and len(right.collections[0].get_offsets()) == 200
    with pytest.raises(ValueError, match='3 images or more'):
        plots.hull(model, pixels[:2])


def test_morph_ends_are_reconstructions():
    model = tiny()
    task = MixTask(model, 'alignmix_ae', dict(dim=16, width=4), img_size=128, verbose=False)
    task.trainable_module.eval()
    pixels = torch.rand(2, 3, 128, 128)
    figure = plots.morph(model, task.mix, pixels, lams=(1.0, 0.5, 0.0))
    layers = task.mix.extra
    with torch.no_grad():
        A = layers.pool(task.mix.head.feature_map(network_input(model, pixels)))
        recon = to_pixels(model, layers.decoder(layers.encode(A))).permute(0, 2, 3, 1).numpy()
    cells = [ax.images[0].get_array() for ax in figure.axes]
    for place, expected in ((1, recon[0]), (6, recon[1]), (11, recon[0]), (13, recon[1])):
        np.testing.assert_allclose(cells[place], expected, atol=1e-5)
    assert np.abs(cells[3] - cells[13]).max() > 1e-4  # aligned: B's features at A's positions are not B


def test_commands(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(map(str, photos))
    network = ['--model', 'test_resnet', '--no-pretrained', '--img-size', '64']
    main(['gallery', *names[:2], '--lams', '0.5'])
    assert Image.open('gallery.png').size[0] > 300
    main(['alignment', *names[:2], *network, '--layer', '2', '--positions', '0,0', '1,1', '--output', 'a.svg'])
    assert '<svg' in (tmp_path / 'a.svg').read_text()
    main(['attention', str(tmp_path / 'cat'), str(tmp_path / 'dog'), '--count', '2', *network, '--dpi', '30'])
    main(['hull', *names, '--count', '4', '--n', '20', *network, '--dpi', '30'])
    assert {'attention.png', 'hull.png'} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match='needs 2 images, got 1'):
        main(['gallery', names[0]])
    with pytest.raises(SystemExit, match='no such checkpoint'):
        main(['morph', *names[:2], '--model', 'nowhere'])
