// The two lines to the session. A connection: send(message, buffers) · onMessage(fn(message, buffers)) ·
// onStatus(fn(status)) · close(). status: "open" or "lost".

export function frame(message, buffers = []) {
  const header = new TextEncoder().encode(JSON.stringify({ ...message, buffers: buffers.map((b) => b.byteLength) }));
  const bytes = new Uint8Array(4 + header.length + buffers.reduce((n, b) => n + b.byteLength, 0));
  new DataView(bytes.buffer).setUint32(0, header.length, true);
  bytes.set(header, 4);
  let start = 4 + header.length;
  for (const buffer of buffers) {
    bytes.set(new Uint8Array(buffer.buffer ?? buffer, buffer.byteOffset ?? 0, buffer.byteLength), start);
    start += buffer.byteLength;
  }
  return bytes;
}

export function unframe(data) {
  const length = new DataView(data).getUint32(0, true);
  const message = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let start = 4 + length;
  const buffers = message.buffers.map((size) => new Uint8Array(data, (start += size) - size, size));
  return [message, buffers];
}

/** The page's websocket, opened again whenever it is lost. */
export function socketConnection(address) {
  let socket = null;
  let receive = () => {};
  let status = () => {};
  let closed = false;
  let pause = 250; // ms; doubles up to 5 s while nobody answers
  const open = () => {
    socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      pause = 250;
      status("open");
    };
    socket.onmessage = (event) => receive(...unframe(event.data));
    socket.onclose = (event) => {
      if (closed) return;
      status("lost", event.reason);
      setTimeout(open, pause);
      pause = Math.min(5000, pause * 2);
    };
  };
  setTimeout(open, 0); // after the listeners are set
  return {
    kind: "page",
    send(message, buffers) {
      if (socket?.readyState !== WebSocket.OPEN) return false;
      socket.send(frame(message, buffers));
      return true;
    },
    onMessage: (fn) => (receive = fn),
    onStatus: (fn) => (status = fn),
    close() {
      closed = true;
      socket?.close();
    },
  };
}

/** A notebook's comm: custom messages of the widget's model. It says when this view comes and goes: what nobody sees
    is not sent. */
export function modelConnection(model) {
  let receive = () => {};
  const view = crypto.getRandomValues(new Uint32Array(2)).join("-");
  const say = (message, buffers = []) => {
    try {
      model.send(message, undefined, buffers);
    } catch {
      // No kernel behind a saved notebook. Where a host is silent about it, too, the missing answer tells.
    }
  };
  const listen = (message, buffers) =>
    receive(message, (buffers ?? []).map((b) => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength)));
  model.on("msg:custom", listen);
  say({ type: "view", view });
  return {
    kind: "widget",
    send(message, buffers = []) {
      say(message, buffers.map((b) => b.slice().buffer));
      return true;
    },
    onMessage: (fn) => (receive = fn),
    onStatus: (fn) => setTimeout(() => fn("open"), 0),
    close() {
      model.off("msg:custom", listen);
      say({ type: "leave", view });
    },
  };
}
