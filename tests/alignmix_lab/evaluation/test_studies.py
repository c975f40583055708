"""Grids and studies as cases."""
import pytest

from alignmix_lab.evaluation import published
from alignmix_lab.evaluation.studies import STUDIES, Study, grid_study, load_studies, parse_words


def test_grid_values_are_yaml():
    words = ['mix=multimix,none', 'mix_kwargs.m=null,2', 'mix-kwargs.alpha=1,[0.5,2.0]', 'lr=1e-3']
    assert parse_words(words, '--grid') == {
        'mix': ['multimix', 'none'], 'mix_kwargs.m': [None, 2], 'mix_kwargs.alpha': [1, [0.5, 2.0]], 'lr': [0.001]}
    assert parse_words(['epochs=5', 'data_dir=/data/x', 'scale=[0.5, 1.0]', 'mix_kwargs.eps=1e-2'], '--set') == {
        'epochs': 5, 'data_dir': '/data/x', 'scale': [0.5, 1.0], 'mix_kwargs.eps': 0.01}


@pytest.mark.parametrize('words', [['n'], ['=1'], ['n=1', 'n=2'], ['n='], ['n=[1']])
def test_grid_errors_name_the_word(words):
    with pytest.raises(ValueError, match=r'n?='):
        parse_words(words, '--grid')


def test_grid_is_the_product_in_order():
    study = grid_study({'mix': ['multimix', 'densemultimix'], 'mix_kwargs.n': [1, 10, 1000]})
    assert [(cell.settings['mix'], cell.settings['mix_kwargs.n']) for cell in study.cells] == [
        ('multimix', 1), ('multimix', 10), ('multimix', 1000),
        ('densemultimix', 1), ('densemultimix', 10), ('densemultimix', 1000)]
    assert study.x == 'mix_kwargs.n'


def test_papers_studies_have_every_published_case():
    studies = {study.name: study for study in load_studies([str(STUDIES)])}
    named = {cell.published for name in ('alignment', 'resolution') for cell in studies[name].cells}
    table = {figure.method for figure in published.find(paper='A', table='Table 6')}
    assert table - named == {'StyleCutMix'} and named <= table  # the one method that is not ours
    assert [cell.published for cell in studies['iterations'].cells] == [
        figure.method for figure in published.find(paper='A', table='Table 10')]
    for name, values in (('m', [None, 2]), ('n', [100, 1000])):  # Figure 4(b) for two m, (c) for two n
        other = 'n' if name == 'm' else 'm'
        assert {cell.settings[f'mix_kwargs.{name}'] for cell in studies[other].cells} == set(values)


def test_cases_are_compared_with_the_reference():
    def references(study: Study) -> dict[str, str | None]:
        found = {cell.name: study.reference_of(cell) for cell in study.cells}
        return {name: other and other.name for name, other in found.items()}

    assert references(grid_study({'mix': ['none', 'mixup'], 'lr': [1, 2]})) == {
        'none lr=1': None, 'none lr=2': None, 'mixup lr=1': 'none lr=1', 'mixup lr=2': 'none lr=2'}
    assert grid_study({'mix': ['none']}).reference is grid_study({'lr': [1, 2]}).reference is None
    cases = [{'mix': 'none', 'label': 'plain'}, {'mix': 'multimix', 'mix_kwargs.n': [1, 2]}]
    for reference in ('plain', {'mix': 'none'}):
        assert references(Study('s', 'S', cases, reference=reference, set={'lr': 1})) == {
            'plain': None, 'lr=1 multimix n=1': 'plain', 'lr=1 multimix n=2': 'plain'}
    cases = [{'mix': 'alignmix', 'mix_kwargs.eps': [0.1, 0.2]}, {'mix': 'alignmix'}]
    assert references(Study('s', 'S', cases, reference={'mix': 'alignmix'})) == {
        'alignmix eps=0.1': 'alignmix', 'alignmix eps=0.2': 'alignmix', 'alignmix': None}
    studies = {study.name: study for study in load_studies([str(STUDIES)])}
    assert {*references(studies['mixes']).values()} == {None, 'none'}
