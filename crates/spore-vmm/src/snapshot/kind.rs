//! What the sections of a saved machine are of. Their numbers are those of every release: one that
//! is not written any more is not given to another part.

use super::format::Tag;

/// A kind of part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// How large the machine is, and what is in it. One.
    Machine,
    /// The interrupt controller and the clock. One.
    Vm,
    /// A processor, by its number.
    Vcpu,
    /// The serial port. One.
    Serial,
    /// Events that the guest has not read. One.
    Power,
    /// The registers of a virtio device, by its slot.
    Transport,
    /// A disk, by its slot.
    Blk,
    /// A network device, by its slot.
    Net,
    /// A port of the agent's, by its slot.
    Console,
}

const KINDS: [(u8, Kind, &str); 9] = [
    (1, Kind::Machine, "machine"),
    (2, Kind::Vm, "VM"),
    (3, Kind::Vcpu, "processor"),
    (4, Kind::Serial, "serial port"),
    (5, Kind::Power, "power"),
    (6, Kind::Transport, "transport"),
    (7, Kind::Blk, "disk"),
    (8, Kind::Net, "network"),
    (9, Kind::Console, "console"),
];

impl Kind {
    /// The only part of this kind.
    #[must_use]
    pub fn only(self) -> Tag {
        self.of(0)
    }

    /// One of this kind.
    #[must_use]
    pub fn of(self, number: u8) -> Tag {
        let found = KINDS.iter().find(|(_, kind, _)| *kind == self);
        let (kind, ..) = found.expect("every kind has its number");
        Tag {
            kind: *kind,
            number,
        }
    }
}

/// What people call a kind, if there is one of this number.
#[must_use]
pub fn name(number: u8) -> Option<&'static str> {
    let found = KINDS.iter().find(|(kind, ..)| *kind == number);
    found.map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::{KINDS, Kind, name};

    #[test]
    fn each_kind_has_the_number_of_every_release() {
        for (at, (number, kind, called)) in (1..).zip(KINDS) {
            assert_eq!(number, at);
            assert_eq!(name(number), Some(called));
            assert_eq!((kind.of(3).kind, kind.of(3).number), (number, 3));
        }
        assert_eq!(Kind::Vcpu.of(2).to_string(), "3.2 (processor)");
        assert_eq!(Kind::Console.only().to_string(), "9.0 (console)");
        assert_eq!(name(0), None);
    }
}
