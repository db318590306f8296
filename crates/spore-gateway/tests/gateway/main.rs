//! Stories about one gateway: the daemon is played over the real socket, apps are real servers on
//! loopback, clients speak raw HTTP/1.1.

#[cfg(test)]
mod answers;
#[cfg(test)]
mod app;
#[cfg(test)]
mod client;
#[cfg(test)]
mod daemon;
#[cfg(test)]
mod heads;
#[cfg(test)]
mod lives;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod upgrades;
#[cfg(test)]
mod wakes;
