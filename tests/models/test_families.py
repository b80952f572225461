"""What the page says of each family is what transformers' own classes say."""

import pytest
import tiny
import transformers

from qwenvl.models.families import FAMILIES, Family, family_of

KNOWN = [family for family in FAMILIES if family in transformers.CONFIG_MAPPING]


def defaults(family):
    """The configuration that transformers has for the family, and that of its text part."""
    config = transformers.CONFIG_MAPPING[family]()
    return config, config.get_text_config()


def test_there_is_a_tiny_model_of_every_family():
    assert set(tiny.CLASSES) == set(FAMILIES)


@pytest.mark.parametrize("family", KNOWN)
def test_a_family_sees_where_its_config_has_a_vision_tower_and_a_token_is_a_square_of_its_patches(family):
    vision = getattr(defaults(family)[0], "vision_config", None)
    page = family_of(family)
    assert page.has_vision == (vision is not None)
    assert page.patch == (vision.patch_size * vision.spatial_merge_size if vision else 0)


@pytest.mark.parametrize("family", KNOWN)
def test_linear_attention_is_what_layers_of_the_config_say(family):
    kinds = getattr(defaults(family)[1], "layer_types", None) or []
    assert family_of(family).linear_attention == ("linear_attention" in kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_sees_counts_pixels_or_thousandths_and_only_qwen2_5_vl_counts_pixels(family):
    page = family_of(family)
    assert (page.coordinates in ("pixels", "0-1000")) == page.has_vision
    assert (page.coordinates == "pixels") == (family == "qwen2_5_vl")


def test_experts_and_linear_attention_have_no_dense_step():
    dense = {family for family, page in FAMILIES.items() if page.decode == "dense"}
    assert not {family for family in dense if "moe" in family or family_of(family).linear_attention}
    assert {page.decode for page in FAMILIES.values()} == {"dense", ""}


def test_of_what_is_not_on_the_page_nothing_is_known():
    for name in ("", "bert", "Qwen2.5-VL-7B-Instruct"):
        assert family_of(name) == Family()
        assert not family_of(name).has_vision
