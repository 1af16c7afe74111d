// The photo being edited: turned, cropped, painted over. The edits are sent to the server as
// {turns, crop: [left, top, right, bottom] in shares of the turned photo, mask: PNG address or null}.
const get = (selector) => element.querySelector(selector);
const photo = get('.photo'), paint = get('.paint'), board = get('.board'), box = get('.box'), cursor = get('.cursor');
const colour = '#e0245e', most = 20;
let image = null, turns = 0, crop = [0, 0, 1, 1], tool = 'paint', past = [], painted = false;
let last = null, corner = null, at = null, down = false;

const pen = () => paint.getContext('2d', { willReadFrequently: true });
const button = (name) => get(`[data-do=${name}]`);
const painting = () => props.painting !== false && tool !== 'crop';
const radius = () => Math.max(0.5, (get('[data-brush]').value / 200) * Math.min(paint.width, paint.height));

function tell() {
  props.value = JSON.stringify({ turns, crop, mask: painted ? paint.toDataURL('image/png') : null });
  trigger('change');
}

function snapshot() {
  past.push({ turns, crop, painted, pixels: pen().getImageData(0, 0, paint.width, paint.height) });
  if (past.length > most) past.shift();
}

function draw() { // the photo as it is turned and cropped; the paint's canvas gets its size and is empty then
  const upright = turns % 2 === 0, w = upright ? image.width : image.height, h = upright ? image.height : image.width;
  const [l, t] = [Math.round(crop[0] * w), Math.round(crop[1] * h)];
  const [W, H] = [Math.max(1, Math.round(crop[2] * w) - l), Math.max(1, Math.round(crop[3] * h) - t)];
  for (const canvas of [photo, paint]) { canvas.width = W; canvas.height = H; }
  const context = photo.getContext('2d');
  context.translate(-l + w / 2, -t + h / 2);
  context.rotate((turns * Math.PI) / 2);
  context.drawImage(image, -image.width / 2, -image.height / 2);
  board.style.aspectRatio = `${W} / ${H}`;
  board.style.maxWidth = `calc(min(60vh, 560px) * ${W / H})`;
}

function show() {
  const whole = crop.join() === '0,0,1,1';
  get('.painting').hidden = props.painting === false;
  paint.style.visibility = props.painting === false ? 'hidden' : 'visible';
  if (tool === 'crop') paint.style.visibility = 'visible';
  for (const name of ['paint', 'erase', 'crop']) button(name).setAttribute('aria-pressed', String(tool === name));
  button('whole').hidden = whole;
  button('undo').disabled = !past.length;
  button('clear').disabled = !painted;
  paint.style.touchAction = painting() || tool === 'crop' ? 'none' : 'auto';
  paint.style.opacity = props.painting === false ? 0 : 0.6;
  board.dataset.tool = painting() ? 'brush' : tool === 'crop' ? 'crop' : 'look';
  const keys = 'With the keyboard: arrows move, space presses and lifts.';
  const what = tool === 'crop' ? 'Drag a box around the part to keep.' : 'Paint over what is damaged.';
  paint.setAttribute('aria-label', `${what} ${keys}`);
  get('.hint').textContent = tool === 'crop' || props.painting !== false ? what : '';
}

function turn(step) {
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [paint.width, paint.height];
  copy.getContext('2d').drawImage(paint, 0, 0);
  const [l, t, r, b] = crop;
  crop = step > 0 ? [1 - b, l, 1 - t, r] : [t, 1 - r, b, 1 - l];
  turns = (turns + step + 4) % 4;
  draw();
  const context = pen();
  context.save();
  context.translate(paint.width / 2, paint.height / 2);
  context.rotate((step * Math.PI) / 2);
  context.drawImage(copy, -copy.width / 2, -copy.height / 2);
  context.restore();
}

function cut(l, t, r, b) { // in pixels of the canvas
  const [W, H] = [paint.width, paint.height];
  if (r - l < 8 || b - t < 8) return;
  const kept = pen().getImageData(l, t, r - l, b - t);
  const [x, y, w, h] = [crop[0], crop[1], crop[2] - crop[0], crop[3] - crop[1]];
  crop = [x + (l / W) * w, y + (t / H) * h, x + (r / W) * w, y + (b / H) * h];
  draw();
  pen().putImageData(kept, 0, 0);
}

function stroke(a, b) {
  const context = pen();
  context.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
  context.strokeStyle = colour;
  context.lineWidth = 2 * radius();
  context.lineCap = context.lineJoin = 'round';
  context.beginPath();
  context.moveTo(a.x, a.y);
  context.lineTo(b.x + 1e-3, b.y);
  context.stroke();
  context.globalCompositeOperation = 'source-over';
  painted = true;
}

function press(p) {
  if (!image || !(painting() || tool === 'crop')) return;
  down = true;
  snapshot();
  if (tool === 'crop') { corner = p; } else { stroke(p, p); }
  last = p;
}

function move(p) {
  at = p;
  const shown = paint.clientWidth / paint.width, size = painting() ? 2 * radius() * shown : 12;
  Object.assign(cursor.style, { left: `${p.x * shown}px`, top: `${p.y * shown}px`, width: `${size}px`, height: `${size}px` });
  if (!down) return;
  if (tool === 'crop') {
    const [l, t] = [Math.min(p.x, corner.x), Math.min(p.y, corner.y)];
    const sides = { left: l, top: t, width: Math.abs(p.x - corner.x), height: Math.abs(p.y - corner.y) };
    for (const side in sides) box.style[side] = `${sides[side] * shown}px`;
    box.hidden = false;
  } else { stroke(last, p); }
  last = p;
}

function lift() {
  if (!down) return;
  down = false;
  if (tool === 'crop') {
    const ends = [[corner.x, last.x, paint.width], [corner.y, last.y, paint.height]];
    const [[l, r], [t, b]] = ends.map(([u, v, side]) => [u, v].sort((m, n) => m - n).map((n) => Math.round(Math.min(side, Math.max(0, n)))));
    box.hidden = true;
    cut(l, t, r, b);
    tool = 'paint';
  }
  show();
  tell();
}

const point = (event) => {
  const size = paint.getBoundingClientRect();
  return { x: ((event.clientX - size.left) / size.width) * paint.width, y: ((event.clientY - size.top) / size.height) * paint.height };
};
paint.addEventListener('pointerdown', (event) => {
  if (event.button) return;
  paint.setPointerCapture(event.pointerId);
  press(point(event));
});
paint.addEventListener('pointermove', (event) => { cursor.hidden = !painting(); move(point(event)); });
paint.addEventListener('pointerup', lift);
paint.addEventListener('pointercancel', lift);
paint.addEventListener('pointerleave', () => { if (document.activeElement !== paint) cursor.hidden = true; });
paint.addEventListener('keydown', (event) => {
  const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!direction && event.key !== ' ') return;
  event.preventDefault();
  at = at || { x: paint.width / 2, y: paint.height / 2 };
  cursor.hidden = false;
  if (direction) {
    const step = Math.max(1, Math.min(paint.width, paint.height) / (event.shiftKey ? 10 : 50));
    const inside = (n, side) => Math.min(side, Math.max(0, n));
    move({ x: inside(at.x + direction[0] * step, paint.width), y: inside(at.y + direction[1] * step, paint.height) });
  } else if (down) { lift(); } else { press(at); move(at); }
});

element.addEventListener('click', (event) => {
  const name = event.target.dataset.do;
  if (!name || !image) return;
  if (name === 'crop') { tool = tool === 'crop' ? 'paint' : 'crop'; }
  if (name === 'paint' || name === 'erase') { tool = name; }
  if (name === 'left' || name === 'right') { snapshot(); turn(name === 'left' ? -1 : 1); tell(); }
  if (name === 'whole') { snapshot(); crop = [0, 0, 1, 1]; painted = false; draw(); tell(); }
  if (name === 'clear') { snapshot(); painted = false; pen().clearRect(0, 0, paint.width, paint.height); tell(); }
  if (name === 'undo') {
    const before = past.pop();
    ({ turns, crop, painted } = before);
    draw();
    pen().putImageData(before.pixels, 0, 0);
    tell();
  }
  show();
});

function load(address, then) {
  const loaded = new Image();
  loaded.onload = () => then(loaded);
  loaded.src = address;
}

function begin() {
  if (!props.photo) { image = null; props.value = ''; return; }
  load(props.photo, (loaded) => {
    image = loaded;
    [turns, crop, tool, past, painted, at] = [0, [0, 0, 1, 1], 'paint', [], false, null];
    draw();
    show();
    tell();
  });
}

watch('photo', begin);
watch('painting', show);
watch('proposal', () => {
  if (!image || !props.proposal) return;
  load(JSON.parse(props.proposal).mask, (mask) => {
    snapshot();
    const context = pen();
    context.clearRect(0, 0, paint.width, paint.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(mask, 0, 0, paint.width, paint.height);
    painted = true;
    show();
    tell();
  });
});
begin();
