"""`import timm_alignmix`: its names."""
import timm_alignmix


def test_every_public_name_is_there_and_listed():
    assert all(getattr(timm_alignmix, name) is not None for name in timm_alignmix.__all__)
