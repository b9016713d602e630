// A scan of the page in three planes and in 3D, with its label maps (NiiVue, read when the first one is opened).
"use strict";
const read = id => JSON.parse(byId(id)?.textContent || "null");
const scans = read("scans") || {};
const MAPS = ["image", "reference", "prediction"];
let viewer = null, ready = null, turn = 0;
const attached = async () => {
  document.head.append(make("script", byId("niivue").textContent));
  const made = new niivue.Niivue({
    isRadiologicalConvention: true, backColor: [0, 0, 0, 1], show3Dcrosshair: true, crosshairWidth: 0.5, isColorbar: false,
    crosshairColor: [1, 1, 1, 0.5], crosshairWidthUnit: "mm", isResizeCanvas: true, loadingText: "", logLevel: "error",
    multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS, multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID,
  });
  await made.attachToCanvas(byId("stage"));
  made.setSliceType(made.sliceTypeMultiplanar);
  viewer = made;
};
const open = async key => {
  const scan = scans[key], mine = ++turn;
  byId("frame").hidden = byId("layers").hidden = !scan;
  byId("no-scan").hidden = !!scan;
  if (!scan) { byId("no-scan").textContent = "This page holds the scans of the best, the median and the worst case, and of the first ones that are flagged."; return; }
  await (ready ??= attached());
  const volumes = [];
  for (const what of MAPS.filter(name => scan[name])) {
    const volume = await niivue.NVImage.loadFromBase64({ base64: scan[what], name: `${what}.nii.gz`, colormap: "gray", opacity: 1 });
    if (what !== "image") {
      const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
      for (const [number, name, [r, g, b]] of scan.labels) {
        table.R.push(r); table.G.push(g); table.B.push(b); table.A.push(255); table.I.push(number); table.labels.push(name);
      }
      volume.setColormapLabel(table);
    }
    volumes.push(volume);
  }
  if (mine !== turn) return; // another case was opened meanwhile
  while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[viewer.volumes.length - 1]);
  volumes.forEach(volume => viewer.addVolume(volume));
  const legend = byId("colours");
  legend.replaceChildren(...scan.labels.map(([, name, [r, g, b]]) => {
    const item = make("li", name), chip = make("span", null, { class: "chip", "aria-hidden": "true" });
    chip.style.background = `rgb(${r} ${g} ${b})`;
    item.prepend(chip);
    return item;
  }));
  layers();
  byId("stage").dataset.drawn = key;
};
const layers = () => {
  const strength = byId("strength").value / 100;
  viewer.volumes.forEach((volume, n) => {
    const field = byId(`layer-${volume.name.split(".")[0]}`);
    if (field) viewer.setOpacity(n, field.checked ? strength : 0);
  });
  viewer.setAtlasOutline(byId("layer-outline").checked ? 1 : 0);
};
for (const id of ["layer-reference", "layer-prediction", "layer-outline", "strength"]) byId(id)?.addEventListener("input", () => viewer && layers());
const draw = key => {
  const mine = turn + 1;
  return open(key).catch(error => {
    if (!viewer) ready = null; // the next case tries again
    if (mine !== turn) return;
    byId("frame").hidden = byId("layers").hidden = true;
    byId("no-scan").hidden = false;
    byId("no-scan").textContent = `The scan cannot be drawn here: ${error.message}`;
  });
};
