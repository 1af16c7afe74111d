// The path of the camera, drawn by hand: [[x, y], ...] as fractions of the square.
const canvas = element.querySelector('canvas'), context = canvas.getContext('2d');
let points = [], at = [100, 100], down = false;

function draw() {
  context.clearRect(0, 0, 200, 200);
  context.strokeStyle = '#8884';
  context.lineWidth = 1;
  for (let n = 20; n < 200; n += 20) { context.strokeRect(n, -1, 0, 202); context.strokeRect(-1, n, 202, 0); }
  context.strokeStyle = context.fillStyle = '#e0245e';
  context.lineWidth = 3;
  context.beginPath();
  points.forEach(([x, y]) => context.lineTo(x, y));
  context.stroke();
  if (document.activeElement === canvas) { context.beginPath(); context.arc(...at, 4, 0, 7); context.fill(); }
}
function tell() { props.value = JSON.stringify(points.map(([x, y]) => [x / 200, y / 200])); trigger('change'); }
function press(p) { points = [p]; at = p; down = true; draw(); }
function move(p) { at = p; if (down) points.push(p); draw(); }
function lift() { if (down) { down = false; tell(); } }

const point = (event) => {
  const size = canvas.getBoundingClientRect();
  return [((event.clientX - size.left) / size.width) * 200, ((event.clientY - size.top) / size.height) * 200];
};
canvas.addEventListener('pointerdown', (event) => { canvas.setPointerCapture(event.pointerId); press(point(event)); });
canvas.addEventListener('pointermove', (event) => { if (down) move(point(event)); });
canvas.addEventListener('pointerup', lift);
canvas.addEventListener('pointercancel', lift);
canvas.addEventListener('focus', draw);
canvas.addEventListener('blur', draw);
canvas.addEventListener('keydown', (event) => {
  const direction = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, -5], ArrowDown: [0, 5] }[event.key];
  if (!direction && event.key !== ' ') return;
  event.preventDefault();
  if (direction) move(at.map((n, k) => Math.min(200, Math.max(0, n + direction[k])))); else if (down) lift(); else press(at);
});
element.querySelector('button').addEventListener('click', () => { points = []; draw(); tell(); });
draw();
