// Assigns the values of saved workflows to the widgets that they were saved from. Workflows save values by position,
// and older packs of this family had other widgets in other places. The shape of the values shows which layout a
// workflow was saved with: a text that is not a choice of a list cannot come from it, nor a text from a number widget.
// Does not use the page, so it can be tested without one.

const CONTROL = "control_after_generate";
const isText = (value) => typeof value === "string";
const isNumber = (value) => typeof value === "number";
const isSwitch = (value) => typeof value === "boolean";
const oneOf = (...choices) => (value) => choices.includes(value);

const words = (text) => text.split(" ").filter(Boolean);
const each = (names, shape) => Object.fromEntries(words(names).map((name) => [name, shape]));

// Which values a widget can have, as far as it helps to recognise a layout. Models differ between machines, so any text
// will do. Lists must hold today's choices too; a widget that is missing here may have any value.
const SHAPES = {
  ...each("system text prompt model video_path device", isText),
  ...each("temperature top_p top_k min_p repetition_penalty max_new_tokens seed", isNumber),
  ...each("keep_model_loaded bypass do_sample", isSwitch),
  quantization: oneOf("none", "4bit", "8bit"),
  attention_mode: oneOf(
    ...["sdpa", "eager", "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"],
  ),
  [CONTROL]: oneOf("fixed", "increment", "decrement", "randomize"),
  release: oneOf("when ComfyUI needs memory", "after the prompt", "after the node"),
};

// The layouts of the older packs, the oldest first. Today's begins like the last one of SCG_LocalVLM.
const SAMPLING = `do_sample temperature top_p top_k min_p repetition_penalty max_new_tokens seed ${CONTROL}`;
const FIRST = `model quantization keep_model_loaded temperature max_new_tokens seed ${CONTROL}`;
const SWITCHES = "keep_model_loaded bypass";
const SCG = [
  `model quantization ${SWITCHES} temperature max_new_tokens seed ${CONTROL}`,
  `model quantization ${SWITCHES} temperature max_new_tokens repetition_penalty seed ${CONTROL}`,
  `model quantization ${SWITCHES} ${SAMPLING}`,
  `model quantization attention_mode ${SWITCHES} ${SAMPLING}`,
];
const VISION_LAYOUTS = [
  `text ${FIRST}`,
  `text ${FIRST} video_path`,
  ...SCG.map((names) => `system text ${names} video_path`),
  // A fork of SCG_LocalVLM. It had the first and the last of these layouts for minutes only.
  `system text model quantization attention_mode image_quality enable_image_cache ${SWITCHES} ${SAMPLING} video_path`,
  `system text model quantization attention_mode ${SWITCHES} ${SAMPLING} image_resolution video_path`,
  `system text model quantization attention_mode ${SWITCHES} ${SAMPLING} image_resolution thread_count video_path`,
  // Another fork of the oldest.
  `device text ${FIRST}`,
].map(words);
const TEXT_LAYOUTS = [
  ...[FIRST, ...SCG].map((names) => `system prompt ${names}`),
  `device system prompt ${FIRST}`,
].map(words);

/** Check that the values can have been saved from widgets of these names, in this order. */
function fits(values, names) {
  return values.every((value, place) => value == null || (SHAPES[names[place]] ?? (() => true))(value));
}

function byName(info, names) {
  if (info.widgets_values_named) return info.widgets_values_named;
  const values = info.widgets_values;
  if (!Array.isArray(values)) return values; // some tools write an object
  if (values.length <= names.length && fits(values, names)) return undefined; // today's layout
  const layouts = names.includes("prompt") ? TEXT_LAYOUTS : VISION_LAYOUTS;
  const layout = layouts.find((widgets) => widgets.length === values.length && fits(values, widgets));
  if (!layout) console.warn(`QwenVL: node ${info.id} was saved with an unknown order of widgets. Check its values.`);
  const saved = layout && Object.fromEntries(layout.map((name, place) => [name, values[place]]));
  // In a fork, cuda meant torch's default GPU.
  if (saved?.device === "cuda") saved.device = "auto";
  return saved;
}

/**
 * Move the values of a saved node, in place, to the positions of today's widgets.
 *
 * @param info the node as saved.
 * @param widgets name and value of each saved widget of a new node, in order.
 * @param sockets names of the inputs that the node has.
 */
export function carryOver(info, widgets, sockets) {
  const saved = byName(info, widgets.map(({ name }) => name));
  if (saved) info.widgets_values = widgets.map(({ name, value }) => saved[name] ?? value);
  // The oldest nodes had a single picture input, image.
  const inputs = Array.isArray(info.inputs) ? info.inputs : [];
  const picture = inputs.find((input) => input?.name === "image");
  const first = inputs.find((input) => input?.name === "image1");
  if (picture && !sockets.includes("image") && sockets.includes("image1") && first?.link == null) {
    info.inputs = inputs.filter((input) => input !== first);
    picture.name = "image1";
    delete picture.localized_name;
    delete picture.label;
  }
}

/** Save the names beside the values, as newer pages do by themselves: then the layout need not be guessed. */
export function nameValues(info, widgets) {
  info.widgets_values_named ??= Object.fromEntries(widgets.map(({ name, value }) => [name, value]));
}
