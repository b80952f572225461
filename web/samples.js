// The samples that the templates ask about, small pictures and a video, so that templates run at once; the user then
// chooses another file. A workflow that names one has it copied to ComfyUI's input folder when it is opened.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SAMPLES = new Set(["QwenVL sample.png", "QwenVL sample 2.png", "QwenVL sample.mp4"]);
// Node type -> its widget that names a file.
const LOADERS = { LoadImage: "image", LoadVideo: "file" };

async function isThere(name) {
  const response = await api.fetchApi(`/view?type=input&filename=${encodeURIComponent(name)}`, { method: "HEAD" });
  return response.ok;
}

async function upload(name) {
  if (await isThere(name)) return;
  const sample = await fetch(new URL(`samples/${encodeURIComponent(name)}`, import.meta.url));
  if (!sample.ok) return;
  const form = new FormData();
  form.append("image", new File([await sample.blob()], name));
  form.append("type", "input");
  await api.fetchApi("/upload/image", { method: "POST", body: form });
}

/** Add the file to the lists of new nodes, as the page does after its own uploads. */
function offer(type, name) {
  const given = LiteGraph.registered_node_types[type]?.nodeData?.input?.required?.[LOADERS[type]];
  for (const list of [given?.[0], given?.[1]?.options]) if (Array.isArray(list) && !list.includes(name)) list.push(name);
}

app.registerExtension({
  name: "QwenVL.samples",
  async beforeConfigureGraph(graph) {
    const named = (graph.nodes ?? [])
      .filter(({ type, widgets_values: values }) => type in LOADERS && SAMPLES.has(values?.[0]))
      .map(({ type, widgets_values: values }) => [type, values[0]]);
    for (const [type, name] of named) {
      try {
        await upload(name);
        offer(type, name);
      } catch (error) {
        console.warn(`QwenVL: the sample ${name} is not in the input folder: ${error}`);
      }
    }
  },
});
