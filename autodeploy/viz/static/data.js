// The data of the page, unpacked: what there is, whatever is shown of it.

const MAX_FAN_OUT = 8; // a tensor that more nodes read is a name at its readers, not edges
const KINDS = ["unchanged", "changed", "moved", "rewired", "merged", "replaced", "removed", "added"];

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// One node as it is in one graph or several.
class Version {
  constructor(row) {
    [this.place, this.name, this.op, this.target, this.short, this.args, this.value] = row;
    [this.device, this.bytes, this.module, this.moduleType, this.graph] = row.slice(7);
    [this.source, this.role, this.inputs] = row.slice(12);
  }

  // [place in the arguments, node id] of all that it reads.
  *reads() {
    for (let index = 0; index < this.inputs.length; index += 2) {
      yield [this.inputs[index], this.inputs[index + 1]];
    }
  }
}

// Everything that can be asked of the data without knowing what is shown.
class Book {
  constructor(data) {
    this.glyphs = data.glyphs;
    this.versions = data.versions.map((row) => new Version(row));
    this.places = data.places.map((id, index) => ({ index, id, group: null, far: false, fanOut: 0, versions: [] }));
    for (const version of this.versions) {
      this.places[version.place].versions.push(version);
    }
    this.byId = new Map(this.places.map((place) => [place.id, place]));
    this.stages = data.stages.map((stage) => this.readStage(stage, data.places));
    this.births = new Map(data.births.map(([id, stage, origins]) => [id, { stage, origins }]));
    this.steps = data.steps;
    this.isHistory = data.isHistory;
    this.findFar();
  }

  readStage(stage, ids) {
    const at = new Map(stage.nodes.map((index) => [ids[this.versions[index].place], this.versions[index]]));
    return { ...stage, at };
  }

  // How many read each place at most, and which of them are too many for edges.
  findFar() {
    for (const stage of this.stages) {
      const fanOut = new Int32Array(this.places.length);
      for (const version of stage.at.values()) {
        const sources = new Set([...version.reads()].map(([, id]) => stage.at.get(id)));
        for (const source of sources) {
          if (source !== undefined && source !== version) {
            fanOut[source.place] += 1;
          }
        }
      }
      this.places.forEach((place) => (place.fanOut = Math.max(place.fanOut, fanOut[place.index])));
    }
    const far = new Set(this.places.filter(reachesFar).map((place) => place.id));
    this.places.forEach((place) => (place.far = far.has(place.id)));
  }

  key(source, user) {
    return source * this.places.length + user;
  }

  // All places in and below a group, in order.
  *inside(group) {
    for (const item of group.items) {
      if (isGroup(item)) {
        yield* this.inside(item);
      } else {
        yield item;
      }
    }
  }

  // The groups around a place or group, the root first.
  around(item) {
    const found = [];
    for (let group = isGroup(item) ? item.parent : item.group; group; group = group.parent) {
      found.unshift(group);
    }
    return found;
  }
}

// Whether readers name what a place makes, instead of having an edge from it.
function reachesFar(place) {
  const { op } = place.versions[0];
  return op === "placeholder" || op === "get_attr" || place.fanOut > MAX_FAN_OUT;
}

function isGroup(item) {
  return item.items !== undefined;
}
