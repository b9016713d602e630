// A scan of the page in three planes and in 3D, with its label maps (NiiVue, read when the first one is opened).
"use strict";
const read = id => JSON.parse(byId(id)?.textContent || "null");
const scans = read("scans") || {};
const MAPS = ["image", "reference", "prediction"];
let niivueLoaded = false, viewer = null, turn = 0;
const library = () => {
  if (niivueLoaded) return;
  const script = make("script", byId("niivue").textContent);
  document.head.append(script);
  niivueLoaded = true;
};
const open = async key => {
  const scan = scans[key], mine = ++turn;
  byId("frame").hidden = byId("layers").hidden = !scan;
  byId("no-scan").hidden = !!scan;
  if (!scan) { byId("no-scan").textContent = "This page holds the scans of the best, the median, the worst and the flagged cases only."; return; }
  library();
  if (!viewer) {
    viewer = new niivue.Niivue({
      isRadiologicalConvention: true, backColor: [0, 0, 0, 1], show3Dcrosshair: true, crosshairWidth: 0.5, isColorbar: false,
      crosshairColor: [1, 1, 1, 0.5], crosshairWidthUnit: "mm",
      multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS, multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID, isResizeCanvas: true, textHeight: 0.04, loadingText: "", logLevel: "error",
    });
    await viewer.attachToCanvas(byId("stage"));
    viewer.setSliceType(viewer.sliceTypeMultiplanar);
  }
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
const draw = key => open(key).catch(error => {
  byId("no-scan").hidden = false;
  byId("no-scan").textContent = `The scan cannot be drawn here: ${error.message}`;
});
