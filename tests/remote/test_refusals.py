import pytest

from qwenvl.models.engines import Engine
from qwenvl.remote import refusals
from qwenvl.remote.refusals import EngineError, QuestionError, refused, unknown_fields, words

STUDIO = Engine("studio", "http://10.0.0.5:8000/v1", "Qwen/Some", api_key_env="STUDIO_KEY")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "no such model", "type": "NotFoundError", "code": 404}}', "no such model"),
        ('{"object": "error", "message": "no such model", "code": 404}', "no such model"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"error": "broken"}', "broken"),
        ('{"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]}',
         "Extra inputs are not permitted (body, top_k)"),
        ("<html><h1>502</h1>\n\n<p>Bad gateway</p></html>", "502 Bad gateway"),
        ("", ""),
        ("[1, 2]", "1, 2"),
    ],
)  # fmt: skip
def test_the_words_are_found_in_every_form_that_engines_use(body, said):
    assert words(body) == said


def test_long_words_are_cut():
    assert len(words("x" * 100_000)) < 500


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("Unexpected fields in the request: {'top_k', 'min_p'}", {"top_k", "min_p"}),
        ("Unrecognized request argument supplied: top_k", {"top_k"}),
        ("Extra inputs are not permitted (body, min_p)", {"min_p"}),
        ("Unknown parameter: 'seed'.", {"seed"}),
        ("top_k must be -1 or at least 1, got 0", set()),
        ("Unexpected end of input", set()),
        ("property 'top_k' is unsupported, did you mean 'top_p' or 'seed'?", {"top_k"}),
        ("property 'top_k' is unsupported, did you mean 'stop'? property 'min_p' is unsupported", {"top_k", "min_p"}),
        ("unknown field `top_k`, expected one of `messages`, `model`, `seed`, `stop`", {"top_k"}),
        ("Unrecognized parameter top_k. Supported parameters are: seed, stop", {"top_k"}),
        ("Unsupported parameter: 'min_p'. Use 'seed' instead.", {"min_p"}),
        ("Unsupported parameters: top_k, min_p", {"top_k", "min_p"}),
        ("groq does not support parameters: ['top_k'], for model=m", {"top_k"}),
        ("create() got an unexpected keyword argument 'min_p'", {"min_p"}),
        ("Additional properties are not allowed ('top_k', 'min_p' were unexpected)", {"top_k", "min_p"}),
        ("Argument not supported: cannot use top_k", {"top_k"}),
        ("unknown field my_top_k_value", set()),
    ],
)
def test_fields_count_as_unknown_only_where_the_engine_says_so_and_names_them(said, fields):
    assert unknown_fields(said, ["top_k", "min_p", "seed", "stop"]) == fields


@pytest.mark.parametrize(
    ("status", "said", "kind", "advice"),
    [
        (401, "Incorrect API key provided", EngineError, "STUDIO_KEY"),
        (403, "", EngineError, "STUDIO_KEY"),
        (404, "The model `Qwen/Some` does not exist.", EngineError, "no model 'Qwen/Some'"),
        (400, "Server is pinned to 'A'; requested 'Qwen/Some'.", EngineError, "no model 'Qwen/Some'"),
        (404, "Not Found", EngineError, "/v1"),
        (400, "/chat/completions: Invalid model name passed in model=nope. Call `/v1/models` to view available models.",
         EngineError, "no model 'Qwen/Some'"),
        (400, "Qwen/Some is not a valid model ID", EngineError, "no model 'Qwen/Some'"),
        (400, "Invalid model: Qwen/Some", EngineError, "no model 'Qwen/Some'"),
        (400, "No models loaded. Please load a model in the developer page.", EngineError, "no model 'Qwen/Some'"),
        (400, "could not find suitable inference handler for Qwen/Some", EngineError, "no model 'Qwen/Some'"),
        (400, "The model does not support min_p", QuestionError, "refuses the question"),
        (500, "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
         QuestionError, "vision"),
        (500, "this model is missing data required for image input", QuestionError, "vision"),
        (500, "Model does not support images.", QuestionError, "vision"),
        (500, "failed to decode image: out of memory", QuestionError, "8000 failed: "),
        (500, "input is too large to process. increase the physical batch size", QuestionError, "too long"),
        (400, "The maximum context length is 4096 tokens. You requested 5000.", QuestionError, "max_new"),
        (400, "The input (9000 tokens) is longer than 8192 tokens.", QuestionError, "max_new"),
        (413, "", QuestionError, "smaller pictures"),
        (400, "Qwen/Some is not a multimodal model", QuestionError, "vision"),
        (400, "At most 1 image(s) may be provided in one prompt.", QuestionError, "pictures"),
        (400, "temperature must be at most 1", QuestionError, "refuses the question"),
        (500, "CUDA error", QuestionError, "failed"),
    ],
)  # fmt: skip
def test_each_refusal_says_who_why_and_what_to_do(status, said, kind, advice):
    error = refused(STUDIO, status, said)
    assert type(error) is kind
    assert "ngine 'studio' at 10.0.0.5:8000" in str(error)
    assert said in str(error)
    assert advice in str(error)


@pytest.mark.parametrize(
    ("status", "said", "names"),
    [
        (400, "'stop' must have at most 4 items", {"stop"}),
        (422, "Input should be a valid string (body, stop)", {"stop"}),
        (400, "stop_strings need a tokenizer", {"stop"}),
        (500, "Internal Server Error", {"stop"}),
        (500, "unexpected keyword argument 'top_k'", {"top_k"}),
        (400, "the model is nonstop busy", set()),
        (400, "temperature must be positive", set()),
        (401, "stop", set()),
        (404, "stop", set()),
    ],
)
def test_a_stop_that_an_engine_fails_on_is_left_to_us(status, said, names):
    assert refusals.left_out(status, said, {"stop", "top_k"}) == names
    assert "stop" not in refusals.left_out(status, said, {"top_k"})


def test_without_a_key_the_refusal_says_where_to_name_one():
    assert "api_key_env" in str(refused(Engine("studio", "http://10.0.0.5/v1", "m"), 401, "no"))


def test_a_status_within_a_stream_counts_where_it_is_one():
    assert refusals.status_in({"error": {"message": "x", "code": 400}}) == 400
    assert refusals.status_in({"error": "x"}) == 500
    assert refusals.status_in({"error": {"code": "bad_thing"}}) == 500


def test_words_are_few_and_whole_however_deep_they_are():
    assert len(words("[" * 5000)) < 500
    assert words('{"error": "a\\ud800"}') == "a\ufffd"
    assert len(words('{"error": ' * 800 + '"x"' + "}" * 800)) < 500
