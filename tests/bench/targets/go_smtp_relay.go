// A relay from go-smtp's parts: its server in front, a pool of its clients behind; content is streamed.
//
//	go_smtp_relay HOST:PORT UPSTREAM_HOST:PORT
package main

import (
	"io"
	"log"
	"os"

	"github.com/emersion/go-smtp"
)

const (
	connections  = 20
	messageBytes = 100 << 20
)

var failed = &smtp.SMTPError{Code: 451, EnhancedCode: smtp.EnhancedCode{4, 4, 1}, Message: "Upstream failed"}

// pool keeps connections to the upstream: idle ones, and as many permits as may still be opened.
type pool struct {
	address string
	idle    chan *smtp.Client
	permits chan struct{}
}

func (p *pool) take() (*smtp.Client, error) {
	select {
	case client := <-p.idle:
		return client, nil
	default:
	}
	select {
	case client := <-p.idle:
		return client, nil
	case p.permits <- struct{}{}:
		client, err := smtp.Dial(p.address)
		if err != nil {
			<-p.permits
		}
		return client, err
	}
}

func (p *pool) drop(client *smtp.Client) {
	client.Close()
	<-p.permits
}

type session struct {
	pool       *pool
	from       string
	recipients []string
}

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	s.from = from
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.recipients = append(s.recipients, to)
	return nil
}

func (s *session) Data(content io.Reader) error {
	client, err := s.pool.take()
	if err != nil {
		return failed
	}
	if err := s.send(client, content); err != nil {
		s.pool.drop(client)
		return failed
	}
	s.pool.idle <- client
	return nil
}

func (s *session) send(client *smtp.Client, content io.Reader) error {
	if err := client.Mail(s.from, nil); err != nil {
		return err
	}
	for _, recipient := range s.recipients {
		if err := client.Rcpt(recipient, nil); err != nil {
			return err
		}
	}
	data, err := client.Data()
	if err != nil {
		return err
	}
	if _, err := io.Copy(data, content); err != nil {
		return err
	}
	return data.Close()
}

func (s *session) Reset() {
	s.from, s.recipients = "", nil
}

func (s *session) Logout() error {
	return nil
}

func main() {
	upstream := &pool{os.Args[2], make(chan *smtp.Client, connections), make(chan struct{}, connections)}
	server := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) {
		return &session{pool: upstream}, nil
	}))
	server.Addr = os.Args[1]
	server.Domain = "relay.example.com"
	server.MaxMessageBytes = messageBytes
	log.Fatal(server.ListenAndServe())
}
