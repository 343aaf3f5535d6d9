"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("trajectory-data").textContent);
  const plot = byId("trajectory"), form = byId("trajectory-controls"), state = byId("trajectory-state");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // plotly reads tags in its texts: a checkpoint's name is text.
  const plain = (label) => String(label).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const names = { policy: ["policy", "--c1"], reward: ["reward model", "--c2"] };
  const start = { theta: 0.8, phi: 0.5, radius: 2.3 };
  let camera = start;

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function chosen(name) {
    return form.elements[name].value;
  }

  // The points of a side and of what its straight lines foretold, as traces.
  function traces(name, side, dimensions) {
    const [title, variable] = names[name];
    const line = colour(variable), key = dimensions + "d", axes = ["x", "y", "z"].slice(0, dimensions);
    const points = side.points[key], predicted = side.predicted[key], ends = new Set(side.main), last = points.length - 1;
    const kind = dimensions === 3 ? { type: "scatter3d" } : { type: "scatter" };
    const column = (rows) => Object.fromEntries(axes.map((axis, i) => [axis, rows.map((row) => (row ? row[i] : null))]));
    const size = (i) => (i === 0 || i === last ? 11 : ends.has(i) ? 7 : 4) * (dimensions === 3 ? 0.6 : 1);
    const symbol = (i) => (i === 0 ? "circle-open" : i === last ? "square" : "circle");
    const labels = side.labels.map(plain), dashes = [], words = [];
    side.main.slice(1).forEach((position, i) => {
      dashes.push(points[position], predicted[i], null);
      words.push(labels[position], "after " + labels[position] + ", if it went straight on", "");
    });
    return [
      {
        ...kind, ...column(points), name: title, mode: "lines+markers", text: labels, hovertemplate: "%{text}<extra>" + title + "</extra>",
        line: { color: line, width: dimensions === 3 ? 4 : 2 },
        marker: { opacity: 1, color: line, size: points.map((_, i) => size(i)), symbol: points.map((_, i) => symbol(i)), line: { color: line, width: 2 } },
      },
      {
        ...kind, ...column(dashes), name: title + ", last step repeated", mode: "lines", text: words, hovertemplate: "%{text}<extra></extra>",
        line: { color: line, width: dimensions === 3 ? 3 : 1.5, dash: "dash" }, opacity: 0.7,
      },
    ];
  }

  function eye() {
    const { theta, phi, radius } = camera;
    return { x: radius * Math.cos(phi) * Math.cos(theta), y: radius * Math.cos(phi) * Math.sin(theta), z: radius * Math.sin(phi) };
  }

  function draw() {
    const method = chosen("method"), view = chosen("view"), dimensions = Number(chosen("dimensions"));
    const found = data[view][method];
    const share = (i) => (found.explained_variance ? "PC " + (i + 1) + " (" + Math.round(100 * found.explained_variance[i]) + " %)" : "");
    const axis = (i) => ({
      title: { text: share(i) }, gridcolor: colour("--edge"), zerolinecolor: colour("--edge"), linecolor: colour("--edge"),
      color: colour("--muted"), showspikes: false, showticklabels: method === "pca" && dimensions === 2,
    });
    const exact = method === "pca";
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 50, r: 10, t: 10, b: 45 }, showlegend: false, autosize: true,
      hoverlabel: { font: { size: 13 } },
      xaxis: axis(0), yaxis: { ...axis(1), ...(exact ? { scaleanchor: "x" } : {}) },
      scene: { xaxis: axis(0), yaxis: axis(1), zaxis: axis(2), aspectmode: "cube", camera: { eye: eye() }, dragmode: "orbit" },
    };
    if (dimensions === 3) layout.margin = { l: 0, r: 0, t: 0, b: 10 };
    const lines = Object.keys(names).filter((name) => found[name]).flatMap((name) => traces(name, found[name], dimensions));
    byId("trajectory-turn").hidden = dimensions !== 3;
    return Plotly.react(plot, lines, layout, { responsive: true, displayModeBar: false });
  }

  const move = (change) => (camera = { ...camera, ...change });
  const turns = {
    left: () => move({ theta: camera.theta - 0.2 }), right: () => move({ theta: camera.theta + 0.2 }),
    up: () => move({ phi: Math.min(1.5, camera.phi + 0.2) }), down: () => move({ phi: Math.max(-1.5, camera.phi - 0.2) }),
    nearer: () => move({ radius: camera.radius / 1.2 }), farther: () => move({ radius: camera.radius * 1.2 }),
    reset: () => move(start),
  };

  function turn(event) {
    const action = turns[event.target.dataset.turn];
    if (!action) return;
    action();
    Plotly.relayout(plot, { "scene.camera.eye": eye() });
  }

  // Dragging moves plotly's own camera; the buttons go on from where it is.
  function follow(change) {
    const at = change["scene.camera"] && change["scene.camera"].eye;
    if (!at) return;
    const radius = Math.hypot(at.x, at.y, at.z);
    camera = { theta: Math.atan2(at.y, at.x), phi: Math.asin(at.z / radius), radius };
  }

  async function begin() {
    try {
      const bundle = document.createElement("script");
      bundle.textContent = await inflate(byId("plotly").textContent);
      document.head.append(bundle);
      if (new URLSearchParams(location.search).has("dimensions")) form.elements.dimensions.value = new URLSearchParams(location.search).get("dimensions");
      await draw();
      state.remove();
      form.hidden = false;
      form.addEventListener("change", draw);
      byId("trajectory-turn").addEventListener("click", turn);
      plot.on("plotly_relayout", follow);
      new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    } catch (error) {
      state.textContent = "This browser cannot draw the trajectories (" + error.message + "). The folder figures beside this page has them as pictures.";
    }
  }

  begin();
})();
