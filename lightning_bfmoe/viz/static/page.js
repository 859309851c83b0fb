// A page without a kernel: what a widget's model does, from the data that the page holds.
const data = JSON.parse(document.getElementById("bfm-data").textContent);
const bytes = (base64) => new DataView(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
const values = { ...data.state, angles: bytes(data.angles), probes: bytes(data.probes) };
const model = {
  get: (name) => values[name],
  set: (name, value) => (values[name] = value),
  save_changes() {},
  send() {},
  on() {},
  off() {},
};
render({ model, el: document.getElementById("bfm-root") });
