//! Commands: what a kernel asks its proxy to do on the rail, 16 bytes each, through a queue in host-visible memory.
//!
//! The ordering argument, half at each end. Kernel: a command is pushed after the data it names is complete in
//! memory and a system-scope release; a place of the queue is reused only after an acquire of the proxy's index of
//! commands taken. Proxy: a command is there when the phase bits of both halves are those of its lap, so a half that
//! lands first is not believed; the index is released after both halves have been read.

use super::region::{LANES, Lane};
use super::render::device_codes;
use super::word::{INDEX_BITS, Index};

device_codes! {
    /// What a command asks for.
    opcode {
        /// Put slots of the send ring and signal the tail.
        CHUNK = 0,
        /// Signal the head: credit for slots taken.
        CREDIT = 1,
        /// Put the rail record (and counts) and signal it.
        RAIL = 2,
        /// Put the verdict and signal it.
        VERDICT = 3,
    }
}

// First half:  phase 63 | opcode 61..63 | lane 60 | node 48..60 | channel 36..48 | count 20..36 | pitch 0..20
// Second half: phase 63 | index 0..48
/// Lowest bit and width of each field of the first half; the index fills the second.
pub const PITCH: (u32, u32) = (0, 20);
/// Slots of the chunk.
pub const COUNT: (u32, u32) = (20, 16);
/// Channel of the ring.
pub const CHANNEL: (u32, u32) = (36, 12);
/// The peer's node.
pub const NODE: (u32, u32) = (48, 12);
/// Lane of the operation.
pub const LANE: (u32, u32) = (60, 1);
/// What to do.
pub const OPCODE: (u32, u32) = (61, 2);
/// The bit of either half that tells laps apart.
pub const PHASE_BIT: u32 = 63;

const _: () = {
    assert!(
        PITCH.0 + PITCH.1 == COUNT.0 && COUNT.0 + COUNT.1 == CHANNEL.0 && CHANNEL.0 + CHANNEL.1 == NODE.0
    );
    assert!(NODE.0 + NODE.1 == LANE.0 && LANE.0 + LANE.1 == OPCODE.0 && OPCODE.0 + OPCODE.1 == PHASE_BIT);
    assert!(INDEX_BITS <= PHASE_BIT);
};

/// The unit of a pitch in a command: slots are 16-byte aligned.
pub const PITCH_UNIT: usize = super::ROW_ALIGN;

/// A command, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    /// See [`opcode`].
    pub opcode: u32,
    /// Lane of the operation.
    pub lane: Lane,
    /// The peer's node.
    pub node: usize,
    /// Channel of the ring (chunks and credits).
    pub channel: usize,
    /// Slots of the chunk, contiguous.
    pub count: usize,
    /// Bytes from slot to slot.
    pub pitch: usize,
    /// What is signalled: the tail after the chunk, the head, or the operation.
    pub index: Index,
}

impl Command {
    /// The command in two halves, phase bits aside.
    pub fn read(halves: [u64; 2]) -> Self {
        let field = |(at, width): (u32, u32)| (halves[0] >> at) as usize & ((1 << width) - 1);
        Self {
            opcode: field(OPCODE) as u32,
            lane: LANES[field(LANE)],
            node: field(NODE),
            channel: field(CHANNEL),
            count: field(COUNT),
            pitch: field(PITCH) * PITCH_UNIT,
            index: Index::new(halves[1]),
        }
    }

    /// The two halves, as a kernel pushes them in a lap with `phase`.
    pub fn halves(&self, phase: bool) -> [u64; 2] {
        let put = |(at, width): (u32, u32), value: usize| {
            debug_assert!(value < 1 << width);
            (value as u64) << at
        };
        let phase = u64::from(phase) << PHASE_BIT;
        let first = put(OPCODE, self.opcode as usize)
            | put(LANE, self.lane as usize)
            | put(NODE, self.node)
            | put(CHANNEL, self.channel)
            | put(COUNT, self.count)
            | put(PITCH, self.pitch / PITCH_UNIT);
        [phase | first, phase | self.index.get()]
    }

    /// The declarations in C++.
    pub(super) fn declaration() -> String {
        let mut text =
            String::from("/// Lowest bit of each field of a command's first half.\nnamespace command {\n");
        let fields =
            [("PITCH", PITCH), ("COUNT", COUNT), ("CHANNEL", CHANNEL), ("NODE", NODE), ("LANE", LANE)];
        for (name, (at, _)) in fields.into_iter().chain([("OPCODE", OPCODE)]) {
            text += &format!("constexpr u32 {name} = {at};\n");
        }
        text += &format!(
            "constexpr u32 PITCH_UNIT = {PITCH_UNIT};\nconstexpr u32 PHASE_BIT = {PHASE_BIT};\n}}\n"
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_the_queue() {
        let command = Command {
            opcode: opcode::VERDICT,
            lane: Lane::Combine,
            node: 4095,
            channel: 4094,
            count: 65535,
            pitch: ((1 << 20) - 1) * PITCH_UNIT,
            index: Index::new(u64::MAX),
        };
        for phase in [false, true] {
            assert_eq!(Command::read(command.halves(phase)), command);
            assert!(command.halves(phase).iter().all(|half| (half >> PHASE_BIT == 1) == phase));
        }
    }
}
