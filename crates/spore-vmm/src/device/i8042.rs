//! As much of a keyboard controller as a guest needs to ask for its own reset.
//!
//! The tables say that there is none, so no driver looks for keyboards and waits for their answers.
//! Kernels pulse the reset line through its command port all the same.

use super::{Device, Effect};

/// Ports from the data port to the command port.
pub const PORTS: u64 = 5;

const COMMAND: u64 = 4;

/// Pulses the line that resets the processor.
const RESET: u8 = 0xfe;

/// The controller; it has no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct I8042;

impl Device for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Nothing to be read, and room for a command.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if (offset, data) == (COMMAND, &[RESET]) {
            Effect::Reset
        } else {
            Effect::Nothing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{COMMAND, Device as _, Effect, I8042, RESET};

    #[test]
    fn only_the_reset_command_means_anything() {
        assert_eq!(I8042.write(COMMAND, &[RESET]), Effect::Reset);
        for (offset, data) in [
            (0, &[RESET][..]),
            (COMMAND, &[0xd1][..]),
            (COMMAND, &[RESET, RESET][..]),
        ] {
            assert_eq!(I8042.write(offset, data), Effect::Nothing);
        }
        let mut status = [0xff];
        I8042.read(COMMAND, &mut status);
        assert_eq!(
            status,
            [0],
            "a kernel waits until the input buffer is empty"
        );
    }
}
